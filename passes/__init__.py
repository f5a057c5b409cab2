"""Graph passes: capture, canonicalise, normalise, fuse, precision, price, emit. `pipeline.py` holds the list."""

if __name__ != "fusekit.passes":
    raise ImportError("the folder passes is the package fusekit.passes: run `pip install -e .` and import that")
