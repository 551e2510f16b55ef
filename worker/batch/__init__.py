"""Windows of many tracks become batches on a device: `batcher` joins the others."""
