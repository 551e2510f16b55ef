"""Events in, and acknowledged: `consumer` and its `ledger`; `connection` for all who ask Kafka."""
