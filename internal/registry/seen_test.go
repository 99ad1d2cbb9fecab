package registry_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"sallyport/internal/attest"
	"sallyport/internal/registry"
)

var _ attest.Seen = (*registry.Registry)(nil)

func TestEvidenceCountsForOneKey(t *testing.T) {
	in := start(t)
	ctx := t.Context()
	what, other := [32]byte{1}, [32]byte{2}
	until := time.Now().Add(time.Hour)
	for _, c := range []struct {
		name      string
		what, key [32]byte
		want      error
	}{
		{"first", what, [32]byte{7}, nil},
		{"again by the same key", what, [32]byte{7}, nil},
		{"by another key", what, [32]byte{8}, attest.ErrSeen},
		{"other evidence", other, [32]byte{8}, nil},
	} {
		if err := in.Claim(ctx, c.what, c.key, until); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	var wg sync.WaitGroup
	won := make(chan byte, 8)
	for k := range byte(8) {
		wg.Go(func() {
			if in.Claim(ctx, [32]byte{3}, [32]byte{k + 1}, time.Time{}) == nil {
				won <- k
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d keys claimed the same evidence, want 1", len(won))
	}
}

func TestAForgottenMachineMayJoinWithAnotherKey(t *testing.T) {
	in := start(t)
	ctx := t.Context()
	vm := id("/spire/agent/aws_iid/123456789012/us-west-2/i-1234567890abcdef0")
	what := attest.MachineClaim(vm)
	if err := in.Claim(ctx, what, [32]byte{1}, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := in.Claim(ctx, what, [32]byte{2}, time.Time{}); !errors.Is(err, attest.ErrSeen) {
		t.Errorf("another key: %v", err)
	}
	if err := in.DeleteAgent(ctx, vm); err != nil {
		t.Fatal(err)
	}
	if err := in.Claim(ctx, what, [32]byte{2}, time.Time{}); err != nil {
		t.Errorf("after it was forgotten: %v", err)
	}
}
