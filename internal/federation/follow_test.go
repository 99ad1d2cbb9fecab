package federation

import (
	"context"
	"strings"
	"testing"
	"time"
)

// TestRelationshipsComeAndGo while the follower runs.
func TestRelationshipsComeAndGo(t *testing.T) {
	s := newSite(t, far)
	first := s.doc.Load()
	f := follower(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	f.Hold(first)
	newer := *first
	newer.Sequence = first.Sequence + 1
	s.doc.Store(&newer)
	changed := f.Changed()
	f.Follow([]Relationship{s.relationship()})
	select {
	case <-changed:
	case <-time.After(30 * time.Second):
		t.Fatal("the endpoint was not looked at")
	}
	if b := f.Bundle(far); b == nil || b.Sequence != newer.Sequence {
		t.Errorf("held is %+v", b)
	}
	f.Follow(nil)
	if b := f.Bundle(far); b == nil {
		t.Error("to end a relationship dropped the bundle")
	}
	if err := f.Refresh(t.Context(), s.relationship()); err == nil || !strings.Contains(err.Error(), "followed no more") {
		t.Errorf("a look that ended late: %v", err)
	}
	f.Forget(far)
	if b := f.Bundle(far); b != nil {
		t.Errorf("held is %+v after it was forgotten", b)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAGivenBundleReplacesANewerOne: the operator knows better.
func TestAGivenBundleReplacesANewerOne(t *testing.T) {
	b, _ := bundleOf(t, far)
	old, newer := *b, *b
	old.Sequence, newer.Sequence = 3, 9
	f := follower(t, nil)
	f.Hold(&newer)
	f.Hold(&old)
	if got := f.Bundle(far); got.Sequence != 3 {
		t.Errorf("held is sequence %d", got.Sequence)
	}
}
