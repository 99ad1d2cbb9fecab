package main

import (
	"context"
	"errors"
	"time"

	"sallyport/internal/mesh"
)

const (
	// settle is how far apart two readings of the policy folder are. A file that
	// is written where it stands may be cut off for longer than one that is moved
	// there is without its like: settleInPlace, which is also how long nobody may
	// have written to it.
	settle        = 25 * time.Millisecond
	settleInPlace = 75 * time.Millisecond
	// settleTries bounds the readings while they differ: about a second.
	settleTries = 20
)

// errRestless says that the folder changed all the time it was read.
var errRestless = errors.New("the policy folder keeps changing while it is read; it is read again at its next change: write files beside it and move them into place")

// settled reads the policy folder until two readings agree. Half of a set is
// often a valid one: a guardrails.csv that was cut off to be written anew
// forbids nothing. What was read before, if anything, says how files came by
// what is in them.
func settled(ctx context.Context, read func() (*mesh.Files, error), before *mesh.Files) (*mesh.Files, error) {
	last, lastErr := read()
	for range settleTries {
		t := time.NewTimer(pauseAfter(last, before))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, ctx.Err()
		case <-t.C:
		}
		now, err := read()
		if agree(lastErr, err) && (err != nil || now.Sum() == last.Sum()) {
			return now, err
		}
		last, lastErr = now, err
	}
	return nil, errRestless
}

func pauseAfter(last, before *mesh.Files) time.Duration {
	if last == nil || last.Rewritten(before, settleInPlace) {
		return settleInPlace
	}
	return settle
}

// agree compares what stood in the way.
func agree(a, b error) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Error() == b.Error()
}
