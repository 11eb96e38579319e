"""Classes of the toy landscapes; the position of a name is its label."""

TOY_CLASSES = ("sky", "sea", "mountain", "field", "trees", "sun", "buildings")

SKY, SEA, MOUNTAIN, FIELD, TREES, SUN, BUILDINGS = range(len(TOY_CLASSES))
