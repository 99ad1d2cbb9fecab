package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"sallyport/internal/audit"
)

// mirrored is a copy of a log, in small files.
type mirrored struct {
	t    *testing.T
	m    *audit.Mirror
	from *audit.Log
	sent int
}

func newMirrored(t *testing.T, path string) *mirrored {
	t.Helper()
	m, err := audit.OpenMirror(audit.Config{Path: path, Log: slog.New(slog.DiscardHandler), MaxFile: 2000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return &mirrored{t: t, m: m, from: audit.NewMemory()}
}

// grow adds records that say what they are.
func (m *mirrored) grow(what string, n int) {
	m.t.Helper()
	for i := range n {
		if err := m.from.Append(&audit.Record{Kind: audit.KindAdmin, Src: fmt.Sprintf("%s-%d", what, i)}); err != nil {
			m.t.Fatal(err)
		}
	}
	lines := slices.Collect(bytes.Lines(m.from.Lines()))
	if err := m.m.Receive(m.t.Context(), lines[m.sent:]); err != nil {
		m.t.Fatal(err)
	}
	m.sent = len(lines)
}

// again begins another log in the place of the one before.
func (m *mirrored) again() { m.from, m.sent = audit.NewMemory(), 0 }

// TestAuditTailOfADirectory follows copies over files put aside, a copy that
// begins later, and one whose log starts again.
func TestAuditTailOfADirectory(t *testing.T) {
	dir := t.TempDir()
	a, b := newMirrored(t, filepath.Join(dir, "a.jsonl")), newMirrored(t, filepath.Join(dir, "b.jsonl"))
	a.grow("early", 3)
	b.grow("old", 30)
	if err := os.WriteFile(filepath.Join(dir, "broken.jsonl"), []byte("no record\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out, w := io.Pipe()
	var complaints bytes.Buffer
	var ended sync.WaitGroup
	ended.Go(func() {
		if err := run(ctx, []string{"audit", "tail", "-f", dir, "-n", "2", "-o", "json"}, w, &complaints); err != nil {
			t.Error(err)
		}
		w.Close()
	})
	read := bufio.NewScanner(out)
	expect := func(what string, n int) {
		t.Helper()
		for i := range n {
			if !read.Scan() {
				t.Fatalf("ended before %s-%d: %v", what, i, read.Err())
			}
			var r struct{ Src string }
			if err := json.Unmarshal(read.Bytes(), &r); err != nil || r.Src != fmt.Sprintf("%s-%d", what, i) {
				t.Fatalf("got %s, want %s-%d", read.Bytes(), what, i)
			}
		}
	}
	for _, want := range []string{"old-28", "old-29"} { // the newest of all
		if !read.Scan() || !strings.Contains(read.Text(), want) {
			t.Fatalf("got %s, want %s", read.Text(), want)
		}
	}
	a.grow("rotated", 40)
	expect("rotated", 40)
	c := newMirrored(t, filepath.Join(dir, "c.jsonl"))
	c.grow("new", 20)
	expect("new", 20)
	b.again()
	b.grow("again", 3)
	expect("again", 3)
	b.grow("further", 20)
	expect("further", 20)
	cancel()
	ended.Wait()
	for _, want := range []string{"broken.jsonl is passed over", "b.jsonl: tail audit log: another audit log was begun"} {
		if !strings.Contains(complaints.String(), want) {
			t.Errorf("%q is not in %s", want, &complaints)
		}
	}
	var table bytes.Buffer
	if err := run(t.Context(), []string{"audit", "tail", filepath.Join(dir, "c.jsonl"), "-n", "3"}, &table, io.Discard); err != nil || strings.Count(table.String(), "\n") != 3 || !strings.Contains(table.String(), "new-19") {
		t.Errorf("%s %v", &table, err)
	}
	table.Reset()
	if err := run(t.Context(), []string{"audit", "tail", dir, "-n", "5"}, &table, io.Discard); err != nil || strings.Count(table.String(), "\nb  ") != 4 || !strings.HasPrefix(table.String(), "b  ") {
		t.Errorf("%s %v", &table, err)
	}
}
