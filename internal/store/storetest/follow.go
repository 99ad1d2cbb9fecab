package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/store"
)

func watching(t *testing.T, f *fixture) {
	woken := make(chan int64)
	go func() {
		defer close(woken)
		for seen := int64(0); ; {
			rev, err := f.Watch(t.Context(), seen)
			if err != nil {
				if !errors.Is(err, store.ErrClosed) {
					t.Errorf("Watch = %v, want ErrClosed at last", err)
				}
				return
			}
			seen = rev
			woken <- rev
		}
	}()
	for range 3 {
		want := f.write(t, put("a", "1"))
		if got := <-woken; got != want {
			t.Errorf("Watch = %d, want %d", got, want)
		}
	}
	// A write that changes nothing, or is refused, wakes nobody.
	never := int64(99)
	f.write(t, store.Op{Kind: store.KindEntry, Key: "absent", Delete: true})
	if _, err := f.Write(t.Context(), store.Op{Kind: store.KindEntry, Key: "a", IfRevision: &never}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("Write = %v, want ErrConflict", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Watch(ctx, 3); !errors.Is(err, context.Canceled) {
		t.Errorf("Watch = %v, want context.Canceled", err)
	}
	if rev, err := f.Watch(t.Context(), 2); rev != 3 || err != nil {
		t.Errorf("Watch(2) = %d, %v, want 3 at once", rev, err)
	}
	if err := f.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if rev, more := <-woken; more {
		t.Errorf("Watch = %d after nothing was written", rev)
	}
}

func following(t *testing.T, f *fixture) {
	const writers, each = 8, 25
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := range each {
				f.write(t, put(fmt.Sprint(w), fmt.Sprint(n)))
			}
		})
	}
	for seen := int64(0); seen < writers*each; {
		if _, err := f.Watch(t.Context(), seen); err != nil {
			t.Fatalf("Watch: %v", err)
		}
		list, err := f.Changes(t.Context(), seen, 0)
		if err != nil || len(list) == 0 {
			t.Fatalf("Changes after %d = %d of them, %v", seen, len(list), err)
		}
		for _, c := range list {
			if c.Revision != seen+1 {
				t.Fatalf("revision %d comes after %d", c.Revision, seen)
			}
			seen = c.Revision
		}
	}
	wg.Wait()
}

func leases(t *testing.T, f *fixture) {
	const ttl = 10 * time.Second
	acquire := func(holder string) (*store.Lease, error) {
		return store.LeaseConfig{Store: f, Name: "ca", Holder: holder, TTL: ttl, Now: f.clock}.Acquire(t.Context())
	}
	a, err := acquire("a")
	if err != nil {
		t.Fatalf("Acquire: %v", err)
	}
	if _, err := acquire("b"); !errors.Is(err, store.ErrHeld) || !strings.Contains(err.Error(), "held by a") {
		t.Errorf("Acquire = %v, want ErrHeld by a", err)
	}
	f.advance(ttl - time.Second)
	if err := a.Renew(t.Context()); err != nil {
		t.Errorf("Renew: %v", err)
	}
	f.advance(ttl - time.Second)
	if _, err := a.Write(t.Context(), put("by a", "1")); err != nil {
		t.Errorf("Write under the lease: %v", err)
	}
	f.advance(ttl)
	b, err := acquire("b")
	if err != nil {
		t.Fatalf("Acquire after the end: %v", err)
	}
	if b.Fence() <= a.Fence() {
		t.Errorf("fence %d after %d", b.Fence(), a.Fence())
	}
	// The old holder, which slept, can do no harm now.
	if _, err := a.Write(t.Context(), put("by a", "2")); !errors.Is(err, store.ErrLost) {
		t.Errorf("Write under a lost lease = %v, want ErrLost", err)
	}
	if err := a.Renew(t.Context()); !errors.Is(err, store.ErrLost) {
		t.Errorf("Renew of a lost lease = %v, want ErrLost", err)
	}
	if err := a.Release(t.Context()); err != nil {
		t.Errorf("Release of a lost lease: %v", err)
	}
	f.want(t, store.KindEntry, "by a", "1")
	// A write that conflicts for its own reasons leaves the lease as it is.
	none := int64(0)
	mine := put("by a", "3")
	mine.IfRevision = &none
	if _, err := b.Write(t.Context(), mine); !errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrLost) {
		t.Errorf("Write = %v, want ErrConflict only", err)
	}
	if err := b.Release(t.Context()); err != nil {
		t.Errorf("Release: %v", err)
	}
	c, err := acquire("c")
	if err != nil || c.Fence() <= b.Fence() {
		t.Errorf("Acquire after a release: %v, fence %d after %d", err, c.Fence(), b.Fence())
	}
}
