#!/bin/bash
# Makes Timbre's topics where they don't exist yet; those that exist are left as they are.
#   create-topics.sh BOOTSTRAP_SERVERS [PARTITIONS]
# COMMAND_CONFIG may name a properties file with which the broker lets a client in.
set -euo pipefail

servers=$1
partitions=${2:-12}
PATH=$PATH:/opt/kafka/bin

EVENT_BYTES=1048576                           # TIMBRE_KAFKA__MAX_EVENT_BYTES
DEAD_LETTER_BYTES=$((EVENT_BYTES + 65536))    # a dead letter is the event with headers added
RESULT_BYTES=$((EVENT_BYTES * 8))             # a taggram of hours of music
DEAD_LETTER_MS=$((30 * 24 * 3600 * 1000))     # time to look and to send again

topic() {
    local name=$1 count=$2
    shift 2
    kafka-topics.sh --bootstrap-server "$servers" \
        ${COMMAND_CONFIG:+--command-config "$COMMAND_CONFIG"} \
        --create --if-not-exists --topic "$name" --partitions "$count" "${@/#/--config=}"
}

topic tracks.new "$partitions" max.message.bytes=$EVENT_BYTES
topic tracks.backfill "$partitions" max.message.bytes=$EVENT_BYTES
topic tracks.tags "$partitions" max.message.bytes=$RESULT_BYTES
topic tracks.features "$partitions"
topic tracks.dead-letter 3 max.message.bytes=$DEAD_LETTER_BYTES retention.ms=$DEAD_LETTER_MS
