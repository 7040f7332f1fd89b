//! The memo: keys, stores, classifiers, coalescing, and the service that stands in a classifier's place.
