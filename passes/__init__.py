"""Graph passes: capture, canonicalise, normalise, fuse, precision, price, emit; `pipeline.py` lists them."""

if __name__ != "fusekit.passes":
    raise ImportError("the folder passes is the package fusekit.passes: pip install -e . and import that")
