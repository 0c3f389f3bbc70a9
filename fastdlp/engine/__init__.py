"""The federated engine: steps, batches, aggregation, devices."""
