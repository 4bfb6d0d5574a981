"""Pixels: image files decoded, and fitted or randomly varied to what a network takes."""
