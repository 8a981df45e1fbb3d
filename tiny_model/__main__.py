"""`python -m tiny_model`: rebuild the shipped model from its corpus, into ws/assets/tiny."""

from tiny_model.build import Recipe, build
from ws.cache.places import ASSETS

if __name__ == "__main__":
    build(ASSETS / "tiny", Recipe())
