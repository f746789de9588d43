"""One module per stage of the graph: what goes in, what comes out, what it costs."""
