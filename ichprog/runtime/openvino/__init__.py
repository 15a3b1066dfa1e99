"""The OpenVINO runtime: networks compiled for this CPU.

`runtime` runs the compiled graphs, `backend` is the only module that calls OpenVINO's Python API beyond running a
graph, `graph_cache` caches compiled graphs, and `guided_graph` builds the graph of guided backpropagation.
"""
