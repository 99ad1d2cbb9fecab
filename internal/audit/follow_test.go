package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// A tie is what a process that follows sees of the one before.
type tie struct {
	w Writer

	mu   sync.RWMutex // guards gone; a call in flight holds it
	gone bool
}

func (t *tie) Append(r *Record) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.gone {
		return ErrGone
	}
	return t.w.Append(r)
}

func (t *tie) Sync(ctx context.Context) (uint64, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.gone {
		return 0, ErrGone
	}
	return t.w.Sync(ctx)
}

func (t *tie) cut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.gone = true
}

func follow(t *testing.T, path string, before *Ledger) (*Ledger, *tie) {
	t.Helper()
	seq, _ := before.log.Head()
	tie := &tie{w: before.Writer()}
	l, err := FollowLedger(Config{Path: path, Log: quiet()}, LedgerConfig{}, tie, seq)
	if err != nil {
		t.Fatal(err)
	}
	return l, tie
}

// die leaves a ledger as a process does that is killed.
func (l *Ledger) die(t *testing.T) {
	t.Helper()
	l.telling.Lock()
	defer l.telling.Unlock()
	l.closed.Store(true)
	if err := errors.Join(l.leaveCounts(), l.log.Close()); err != nil {
		t.Error(err)
	}
}

// TestFollowersKeepOneChain hands a log on from one ledger to the next, while
// both take records. Every second one dies instead of ending.
func TestFollowersKeepOneChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	now := ledgerAt(t, path)
	var made, begun atomic.Uint64
	call := func(l *Ledger, w, i int) {
		r := sample()
		r.Path = fmt.Sprintf("/v1/w%d/%d", w, i)
		r.Full = i%13 == 0
		if i%10 == 0 {
			r.Decision, r.Reason, r.Rule = Deny, "no_rule", ""
		}
		if err := l.Append(&r); err != nil || r.ID == "" {
			t.Errorf("append: %v, id %q", err, r.ID)
			return
		}
		begun.Add(1)
		r.Tally.Done(200, r.Trace)
		made.Add(1)
	}
	const rounds, workers, each = 6, 3, 400
	for round := range rounds {
		next, tie := follow(t, path, now)
		var old, both sync.WaitGroup
		for w := range workers {
			old.Go(func() {
				for i := range each {
					call(now, w, i)
				}
			})
			both.Go(func() {
				for i := range 2 * each {
					call(next, w+workers, i)
				}
			})
		}
		old.Wait()
		tie.cut()
		if round%2 == 0 {
			if err := now.Close(); err != nil {
				t.Error(err)
			}
		} else {
			now.die(t)
		}
		if err := next.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		both.Wait()
		now = next
	}
	if err := now.Close(); err != nil {
		t.Fatal(err)
	}
	if rep, err := VerifyFile(path, Trust{}); err != nil || !rep.Integrity.OK {
		t.Fatalf("%+v %v", rep, err)
	}
	sums, full := counted(readRecords(t, path))
	if sums[""] != rounds*workers*each*3 || made.Load() != sums[""] {
		t.Errorf("%d calls are counted, %d were made", sums[""], made.Load())
	}
	t.Logf("%d calls, %d counted, in full %v", made.Load(), sums[""], full)
	if left, _ := filepath.Glob(path + countsSuffix + "*"); len(left) != 1 {
		t.Errorf("files with counts are left: %v", left)
	}
}

// What a process has counted that ended while it followed is told at the next
// start.
func TestFollowerThatDiesIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	now := ledgerAt(t, path)
	next, _ := follow(t, path, now)
	for range 5 {
		r := sample()
		if err := next.Append(&r); err != nil {
			t.Fatal(err)
		}
		r.Tally.Done(200, r.Trace)
	}
	next.die(t)
	if err := now.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ledgerAt(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	if sums, _ := counted(readRecords(t, path)); sums[""] != 5 {
		t.Errorf("%d calls are counted, want 5", sums[""])
	}
	if left, _ := filepath.Glob(path + countsSuffix + "*"); len(left) != 1 {
		t.Errorf("files with counts are left: %v", left)
	}
}

// A log is never written by two: it is not adopted while its writer lives, and
// what cannot be written meanwhile is refused and told.
func TestAdoptWaitsForTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	now := ledgerAt(t, path)
	next, tie := follow(t, path, now)
	tie.cut()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := next.Adopt(ctx); !errors.Is(err, ErrLocked) {
		t.Fatalf("adopted from a process that lives: %v", err)
	}
	waits := make(chan error, 1)
	go func() {
		r := sample()
		r.Full = true
		waits <- next.Append(&r)
	}()
	if err := now.Close(); err != nil {
		t.Fatal(err)
	}
	if err := next.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-waits; err != nil {
		t.Errorf("a record that waited: %v", err)
	}
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	if rep, err := VerifyFile(path, Trust{}); err != nil {
		t.Fatalf("%+v %v", rep, err)
	}
	if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), `"kind":"decision"`) {
		t.Errorf("%s %v", b, err)
	}
}
