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
	for _, id := range []string{"loose-1", "only-shadow", "boota-c7.2", "nobody-1"} {
		if rec, _, err := r.find(t.Context(), id); !errors.Is(err, mesh.ErrNotFound) || !strings.Contains(err.Error(), "ask the proxy") {
			t.Errorf("%s: %+v, %v", id, rec, err)
		}
	}
}
