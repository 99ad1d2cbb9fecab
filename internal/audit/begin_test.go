package audit

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestBeginWhileOldRecordsAreRemoved asks how a log begins while its oldest files go.
func TestBeginWhileOldRecordsAreRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	const last = 400
	write := func(name string, seq uint64) {
		t.Helper()
		if err := os.WriteFile(name, fmt.Appendf(nil, "{\"v\":1,\"seq\":%d,}\n", seq), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for seq := uint64(1); seq < last; seq++ {
		write(segmentName(path, seq), seq)
	}
	write(path, last)
	removed := make(chan error, 1)
	go func() {
		for seq := uint64(1); seq < last; seq++ {
			if err := os.Remove(segmentName(path, seq)); err != nil {
				removed <- err
				return
			}
		}
		removed <- nil
	}()
	for before := uint64(0); before < last; {
		_, first, _, err := Begin(path)
		if err != nil {
			t.Fatalf("after record %d: %v", before, err)
		}
		if first < before {
			t.Fatalf("it began with record %d, and now with %d", before, first)
		}
		before = first
	}
	if err := <-removed; err != nil {
		t.Fatal(err)
	}
}
