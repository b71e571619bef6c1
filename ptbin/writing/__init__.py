"""Planning outputs: storages, pickle and layout, as lists of segments. Pure: opens nothing, moves nothing."""
