package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/audit"
)

// complete says whether the issuer has the lines 1 to n, each at least once.
func (s *sink) complete(n int) bool {
	seen := map[uint64]bool{}
	for _, l := range s.all() {
		r, _, err := audit.ParseLine([]byte(l + "\n"))
		if err != nil {
			return false
		}
		seen[r.Seq] = true
	}
	for i := range n {
		if !seen[uint64(i+1)] {
			return false
		}
	}
	return true
}

func TestAuditIsUploadedWithoutAGap(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	log := filepath.Join(dir, "audit.jsonl")
	record(t, log, 700) // more than one batch
	p := is.newProxy(dir, is.token("node-b")).join()
	await(t, func() bool { return is.sink.complete(700) })
	p.stop()
	record(t, log, 10)
	n := len(is.sink.all())
	p = is.newProxy(dir, "")
	p.cursorWait = time.Minute // a slow machine is no other log
	p.join()
	await(t, func() bool { return is.sink.complete(710) })
	// The end may have come before the acknowledgement of the last batch.
	if again := len(is.sink.all()) - n; again > 10+uploadBatch {
		t.Errorf("%d lines were sent after an orderly restart, want 10, and the last batch at most", again)
	}
}

func TestAuditSurvivesTheIssuer(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	log := filepath.Join(dir, "audit.jsonl")
	p := is.newProxy(dir, is.token("node-b")).join()
	record(t, log, 3)
	await(t, func() bool { return is.sink.complete(3) })
	is.stop()
	record(t, log, 3)
	is.start()
	await(t, func() bool { return is.sink.complete(6) })
	p.stop()
}

func TestSinkThatFailsGetsTheLinesAgain(t *testing.T) {
	is := newIssuer(t)
	is.sink.fail = errors.New("disk full")
	dir := t.TempDir()
	record(t, filepath.Join(dir, "audit.jsonl"), 5)
	p := is.newProxy(dir, is.token("node-b")).join()
	if b, err := os.ReadFile(p.file(cursorFile)); err == nil {
		t.Errorf("the cursor is at %s before a line was kept", b)
	}
	is.sink.mu.Lock()
	is.sink.fail = nil
	is.sink.mu.Unlock()
	await(t, func() bool { return is.sink.complete(5) })
}

func TestCursor(t *testing.T) {
	is := newIssuer(t)
	dir := t.TempDir()
	record(t, filepath.Join(dir, "audit.jsonl"), 5)
	p := is.newProxy(dir, "")
	defer p.client.Close()
	for text, want := range map[string]uint64{"": 0, "x": 0, "0": 0, "3": 3, "5\n": 5, "6": 0, "99999999999999999999": 0} {
		if err := os.WriteFile(p.file(cursorFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := p.cursor(t.Context()); got != want {
			t.Errorf("%q: starts after %d, want %d", text, got, want)
		}
	}
	if err := os.Remove(p.file(cursorFile)); err != nil {
		t.Fatal(err)
	}
	if got := p.cursor(t.Context()); got != 0 {
		t.Errorf("without a file: starts after %d", got)
	}
}

func TestCursorIsNotWrittenForEachBatch(t *testing.T) {
	is := newIssuer(t)
	p := is.newProxy(t.TempDir(), "")
	defer p.client.Close()
	l := &lines{a: p.Agent}
	for i := range 100 {
		if err := l.Acked(uint64(i + 1)); err != nil {
			t.Fatal(err)
		}
		if i == 0 { // ackEvery is over for no slow disk
			l.when = l.when.Add(time.Hour)
		}
	}
	if b, err := os.ReadFile(p.file(cursorFile)); err != nil || string(b) != "1" {
		t.Errorf("cursor %q, %v", b, err)
	}
	l.when = time.Now().Add(-ackEvery)
	if err := errors.Join(l.Acked(101), l.keep()); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(p.file(cursorFile)); !bytes.Equal(b, fmt.Append(nil, 101)) {
		t.Errorf("cursor %q, want 101", b)
	}
}
