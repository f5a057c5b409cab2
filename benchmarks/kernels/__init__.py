"""Op × shape × dtype × direction × provider: the kernel suite behind `fusekit bench`."""
