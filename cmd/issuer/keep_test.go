package main

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
)

// TestReceivedIsKeptByRule sweeps a copy whose proxy is connected, one whose
// proxy is not, and one of a log that started again; others are let alone.
func TestReceivedIsKeptByRule(t *testing.T) {
	dir := t.TempDir()
	ownLog := filepath.Join(t.TempDir(), "audit.jsonl")
	own, err := audit.Open(audit.Config{Path: ownLog, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	w, err := audit.OpenWitness(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	keep := audit.KeepConfig{MaxBytes: 1 << 20, WithoutSink: true}
	open := func() *received {
		r, err := openReceived(dir, keep, slog.New(slog.DiscardHandler), own.Append)
		if err != nil {
			t.Fatal(err)
		}
		r.free = func() (uint64, uint64, error) { return 1 << 40, 1 << 40, nil }
		t.Cleanup(func() { r.Close() })
		return r
	}
	workload := func(name string) spiffeid.ID { return spiffeid.RequireFromString("spiffe://corp.example/" + name) }
	send := func(r *received, name string, size int) {
		t.Helper()
		l := audit.NewMemory()
		for n := 0; n < size; n += 1000 {
			rec := audit.Record{Kind: audit.KindAdmin, Detail: strings.Repeat("d", 1000)}
			if err := l.Append(&rec); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Receive(t.Context(), nodeA, workload(name), slices.Collect(bytes.Lines(l.Lines()))); err != nil {
			t.Fatal(err)
		}
	}
	r := open()
	send(r, "gone", 2<<20)
	send(r, "again", 2<<20)
	r.now = func() time.Time { return time.Now().Add(time.Hour) }
	send(r, "again", 3000)
	r.Close()
	r = open()
	send(r, "here", 2<<20)
	send(r, "small", 3000)
	due, err := r.due(time.Now())
	want := []string{"again@join_token~node-a.jsonl.old-1", "gone@join_token~node-a.jsonl", "here@join_token~node-a.jsonl"}
	if err != nil || !slices.Equal(due, want) {
		t.Fatalf("due are %q %v, want %q", due, err, want)
	}
	for _, name := range due {
		if err := r.sweepOne(t.Context(), filepath.Join(dir, name), w, nil, own); err != nil {
			t.Fatal(err)
		}
		rep, err := audit.VerifyFile(filepath.Join(dir, name), audit.Trust{Witnesses: []string{w.Key()}})
		if err != nil || rep.Kept == nil || rep.Kept.From < 800 {
			t.Errorf("%s: %+v %v", name, rep, err)
		}
	}
	if due, err := r.due(time.Now()); err != nil || len(due) > 0 {
		t.Errorf("due are still %q %v", due, err)
	}
	told := map[string]bool{}
	if err := audit.Each(ownLog, func(_ []byte, r *audit.Record) error {
		for _, name := range want {
			told[name] = told[name] || r.Kind == audit.KindRemoved && strings.Contains(r.Detail, name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !told[want[0]] || !told[want[1]] || !told[want[2]] {
		t.Errorf("the issuer's own log tells of %v", told)
	}
	r.keep = audit.KeepConfig{Age: 8 * time.Hour, WithoutSink: true}
	if due, err := r.due(time.Now().Add(2 * time.Hour)); err != nil || len(due) != 5 {
		t.Errorf("after a part of the age due are %q %v", due, err)
	}
	if due, err := r.due(time.Now()); err != nil || len(due) > 0 {
		t.Errorf("before a part of the age due are %q %v", due, err)
	}
}
