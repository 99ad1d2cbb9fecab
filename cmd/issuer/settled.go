package main

import (
	"context"
	"errors"
	"time"

	"sallyport/internal/mesh"
)

const (
	// settle is how far apart two readings of the policy folder are.
	settle = 50 * time.Millisecond
	// settleTries bounds the readings while they differ: about a second.
	settleTries = 20
)

// errRestless says that the folder changed all the time it was read.
var errRestless = errors.New("the policy folder keeps changing while it is read; it is read again at its next change: write files beside it and move them into place")

// settled reads the policies until two readings agree. Half of a set is often
// a valid one: a guardrails.csv that was cut off to be written anew forbids
// nothing.
func settled(ctx context.Context, read func() (*mesh.Policies, mesh.Sum, error)) (*mesh.Policies, error) {
	_, last, lastErr := read()
	for range settleTries {
		t := time.NewTimer(settle)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, ctx.Err()
		case <-t.C:
		}
		p, sum, err := read()
		if sum == last && agree(lastErr, err) {
			return p, err
		}
		last, lastErr = sum, err
	}
	return nil, errRestless
}

// agree compares what stood in the way: a file that cannot be read has no sum.
func agree(a, b error) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Error() == b.Error()
}
