"""Coloured shapes in small pictures: a world for models that see."""
