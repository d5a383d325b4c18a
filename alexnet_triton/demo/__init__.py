"""The main job: train on real images, and write one page that shows what was learned."""
