package main

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

func TestFindsADecisionInEveryLog(t *testing.T) {
	dir := t.TempDir()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	r, err := openReceived(dir, audit.KeepConfig{}, quiet, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	wrote := map[string][]audit.Record{}
	for _, name := range []string{"a.jsonl", "b.jsonl"} {
		l, err := audit.Open(audit.Config{Path: filepath.Join(dir, name), Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		for _, rec := range []audit.Record{
			{Kind: audit.KindDecision, Decision: audit.Deny, Src: name, Detail: "Bearer abcdefghijklmnop"},
			{Kind: audit.KindRollup, Decision: audit.Allow, Src: name, ID: "boot" + name[:1] + "-c7.1", Count: 4},
			{Kind: audit.KindRollup, Decision: audit.Allow, Src: name, ID: "boot" + name[:1] + "-c7.2", Count: 5, Detail: "candidate"},
			{Kind: audit.KindShadow, Decision: audit.Allow, Src: name, ID: "only-shadow"},
		} {
			if err := l.Append(&rec); err != nil {
				t.Fatal(err)
			}
			wrote[name] = append(wrote[name], rec)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// Refusals are told by a gap record, of the run that refused or of a later.
	for name, ids := range map[string][]string{"e.jsonl": {"rune-1", "later-2"}, "f.jsonl": {"runf-1", "runf-2"}} {
		l, err := audit.Open(audit.Config{Path: filepath.Join(dir, name), Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		for _, rec := range []audit.Record{
			{Kind: audit.KindAdmin, ID: ids[0]},
			{Kind: audit.KindGap, Reason: "refused", ID: ids[1], Count: 16, Total: 20, Detail: "in " + name},
		} {
			if err := l.Append(&rec); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for id, want := range map[string]string{"rune-r5": "e.jsonl", "later-r14": "e.jsonl", "runf-r5": "f.jsonl", "runf-r14": "f.jsonl"} {
		if rec, log, err := r.find(t.Context(), id); err != nil || log != want || rec.Detail != "in "+want {
			t.Errorf("%s: %+v in %s, %v", id, rec, log, err)
		}
	}
	// Neither lines that are not evidence nor what is no record count.
	for name, text := range map[string]string{"c.jsonl.loose": `{"id":"loose-1"}`, "d.jsonl": `{"id":"loose-1"}` + "\n" + strings.Repeat("x", 3<<20)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, recs := range wrote {
		rec, log, err := r.find(t.Context(), recs[0].ID)
		if err != nil || log != name || rec.Src != name || strings.Contains(rec.Detail, "abcdefgh") {
			t.Errorf("%s: %+v in %s, %v", recs[0].ID, rec, log, err)
		}
	}
	if rec, _, err := r.find(t.Context(), "another-c7.1"); err != nil || rec.Count != 4 {
		t.Errorf("a count under the id of an earlier run: %+v, %v", rec, err)
	}
	for _, id := range []string{"loose-1", "only-shadow", "boota-c7.2", "nobody-1", "rune-r4", "rune-r15", "nobody-r5"} {
		if rec, _, err := r.find(t.Context(), id); !errors.Is(err, mesh.ErrNotFound) || !strings.Contains(err.Error(), "ask the proxy") {
			t.Errorf("%s: %+v, %v", id, rec, err)
		}
	}
}
