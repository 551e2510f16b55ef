"""The worker, a module or a folder a stage.

An event's way: `kafka`, `intake`, `cache`, `fetch`, `decode`, `windows`, `batch`, `vote`,
`publish`. `tagger` is the part from `fetch` to `vote`, for events and files alike; `app` wires it.
"""
