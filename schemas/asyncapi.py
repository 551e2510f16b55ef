"""The AsyncAPI 3.0 description of Timbre's topics, made from the event types."""

from typing import Any

from pydantic.json_schema import models_json_schema

from schemas.events import (
    SCHEMA_VERSION,
    DeadLetterHeaders,
    NewTrack,
    TrackFeatures,
    TrackTags,
)
from worker.settings import KafkaSettings

Json = dict[str, Any]

BINDING_VERSION = "0.5.0"
TRACK_ID_KEY: Json = {"type": "string", "description": "The track_id, in UTF-8"}

EXAMPLE_TRACK: Json = {
    "track_id": "t-4711",
    "audio": {"uri": "https://cdn.example.com/t-4711.mp3"},
    "uploaded_at": "2026-01-31T12:00:00Z",
    "priority": "upload",
    "metadata": {"title": "Blue in Brown"},
}
EXAMPLE_CLOUD_EVENT: Json = {
    "specversion": "1.0",
    "id": "8f1c",
    "source": "/uploads",
    "type": "com.example.track.new",
    "datacontenttype": "application/json",
    "data": EXAMPLE_TRACK,
}
EXAMPLE_NOTIFICATION: Json = {
    "Records": [
        {
            "eventSource": "aws:s3",
            "eventName": "ObjectCreated:Put",
            "eventTime": "2026-01-31T12:00:00.000Z",
            "s3": {
                "bucket": {"name": "music"},
                "object": {"key": "two+words.mp3", "size": 5242880, "eTag": "0a1b"},
            },
        }
    ]
}


def document() -> Json:
    """The whole description, as it is written to `asyncapi.json`."""
    topics = {name: field.default for name, field in KafkaSettings.model_fields.items()}
    _, definitions = models_json_schema(
        [
            (NewTrack, "validation"),
            (TrackTags, "serialization"),
            (TrackFeatures, "serialization"),
            (DeadLetterHeaders, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    new_tracks = ["newTrack", "newTrackAsCloudEvent", "bucketNotification"]
    return {
        "asyncapi": "3.0.0",
        "id": "urn:timbre",
        "info": {
            "title": "Timbre",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": "New-track events in, genre tags out. Names of topics are defaults.",
        },
        "defaultContentType": "application/json",
        "servers": {"kafka": {"host": topics["bootstrap_servers"], "protocol": "kafka"}},
        "channels": {
            "newTracks": _channel(topics["topic_new"], "Tracks just uploaded", new_tracks),
            "backfill": _channel(
                topics["topic_backfill"], "The same events at lower priority", new_tracks
            ),
            "tags": _channel(topics["topic_tags"], "Each track's tags", ["trackTags"]),
            "features": _channel(
                topics["topic_features"], "Each track's embedding", ["trackFeatures"]
            ),
            "deadLetters": _channel(
                topics["topic_dead_letter"],
                "Messages that can't be tagged, as they were, with the reason in their headers",
                ["deadLetter"],
            ),
        },
        "operations": {
            "readNewTracks": _operation("receive", "newTracks", group=topics["group"]),
            "readBackfill": _operation("receive", "backfill", group=topics["group"]),
            "publishTags": _operation("send", "tags"),
            "publishFeatures": _operation("send", "features"),
            "publishDeadLetters": _operation("send", "deadLetters"),
        },
        "components": {
            "messages": _messages(),
            "schemas": {
                **definitions["$defs"],
                "NewTrackCloudEvent": _cloud_event(),
                "BucketNotification": _bucket_notification(),
            },
        },
    }


def _channel(topic: str, description: str, messages: list[str]) -> Json:
    return {
        "address": topic,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {"kafka": {"topic": topic, "bindingVersion": BINDING_VERSION}},
    }


def _operation(action: str, channel: str, *, group: str | None = None) -> Json:
    operation: Json = {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}
    if group is not None:
        operation["bindings"] = {
            "kafka": {
                "groupId": {"type": "string", "enum": [group]},
                "bindingVersion": BINDING_VERSION,
            }
        }
    return operation


def _messages() -> Json:
    return {
        "newTrack": _message(
            "NewTrack",
            "A track to be tagged. As a CloudEvent in binary mode it carries ce_* headers.",
            key=TRACK_ID_KEY,
            headers=_cloud_event_headers(),
            example=EXAMPLE_TRACK,
        ),
        "newTrackAsCloudEvent": _message(
            "NewTrackCloudEvent",
            "The same as a CloudEvent 1.0 in structured mode",
            key=TRACK_ID_KEY,
            content_type="application/cloudevents+json",
            example=EXAMPLE_CLOUD_EVENT,
        ),
        "bucketNotification": _message(
            "BucketNotification",
            "What S3, MinIO and Ceph publish: each object created is a track",
            example=EXAMPLE_NOTIFICATION,
        ),
        "trackTags": _message("TrackTags", "A track's tags", key=TRACK_ID_KEY),
        "trackFeatures": _message("TrackFeatures", "A track's embedding", key=TRACK_ID_KEY),
        "deadLetter": {
            "name": "deadLetter",
            "title": "DeadLetter",
            "summary": "The original message, byte for byte, whatever it was",
            "contentType": "application/octet-stream",
            "headers": {"$ref": "#/components/schemas/DeadLetterHeaders"},
            "payload": {},
            "bindings": {
                "kafka": {
                    "key": {"description": "The original key"},
                    "bindingVersion": BINDING_VERSION,
                }
            },
        },
    }


def _message(
    schema: str,
    summary: str,
    *,
    key: Json | None = None,
    headers: Json | None = None,
    content_type: str = "application/json",
    example: Json | None = None,
) -> Json:
    message: Json = {
        "name": schema[0].lower() + schema[1:],
        "title": schema,
        "summary": summary,
        "contentType": content_type,
        "payload": {"$ref": f"#/components/schemas/{schema}"},
    }
    if headers is not None:
        message["headers"] = headers
    if example is not None:
        message["examples"] = [{"name": "typical", "payload": example}]
    if key is not None:
        message["bindings"] = {"kafka": {"key": key, "bindingVersion": BINDING_VERSION}}
    return message


def _cloud_event_headers() -> Json:
    return {
        "type": "object",
        "properties": {
            "ce_specversion": {"type": "string", "enum": ["1.0"]},
            "ce_id": {"type": "string"},
            "ce_source": {"type": "string"},
            "ce_type": {"type": "string"},
            "content-type": {"type": "string"},
        },
    }


def _cloud_event() -> Json:
    return {
        "title": "NewTrackCloudEvent",
        "type": "object",
        "required": ["specversion", "id", "source", "type"],
        "properties": {
            "specversion": {"type": "string", "enum": ["1.0"]},
            "id": {"type": "string", "minLength": 1},
            "source": {"type": "string", "minLength": 1},
            "type": {"type": "string", "minLength": 1},
            "datacontenttype": {"type": "string"},
            "data": {
                "anyOf": [
                    {"$ref": "#/components/schemas/NewTrack"},
                    {"$ref": "#/components/schemas/BucketNotification"},
                ]
            },
            "data_base64": {"type": "string", "description": "The same, in base64"},
        },
    }


def _bucket_notification() -> Json:
    entry = {
        "type": "object",
        "required": ["eventName"],
        "properties": {
            "eventName": {
                "type": "string",
                "description": (
                    "ObjectCreated:Put, Post, Copy and CompleteMultipartUpload are tracks, "
                    "with or without s3: before it"
                ),
            },
            "eventSource": {"type": "string"},
            "eventTime": {"type": "string"},
            "s3": {
                "type": "object",
                "properties": {
                    "bucket": {"type": "object", "properties": {"name": {"type": "string"}}},
                    "object": {
                        "type": "object",
                        "properties": {
                            "key": {"type": "string", "description": "URL-encoded (not by Ceph)"},
                            "size": {},
                            "eTag": {"type": "string"},
                            "versionId": {"type": "string"},
                            "sequencer": {"type": "string"},
                        },
                    },
                },
            },
        },
    }
    return {
        "title": "BucketNotification",
        "type": "object",
        "required": ["Records"],
        "properties": {"Records": {"type": "array", "items": entry}},
    }
