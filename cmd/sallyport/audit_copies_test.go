package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// oneHead keeps the heads of one log.
type oneHead struct {
	b   []byte
	rev int64
}

func (h *oneHead) Load(context.Context, string) ([]byte, int64, error) { return h.b, h.rev, nil }

func (h *oneHead) Save(_ context.Context, _ string, b []byte, _ int64) (bool, error) {
	h.b = b
	h.rev++
	return true, nil
}

// TestAuditVerifyOfADirectory verifies a copy, the one of the log before it, and
// says what is not covered.
func TestAuditVerifyOfADirectory(t *testing.T) {
	workload, agent := spiffeid.RequireFromString("spiffe://corp.example/billing"), spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/n1")
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "heads.json")
	base := audit.CopyName(workload, agent)
	path := filepath.Join(dir, base)
	// The command line is outside of the bubble: it listens for signals.
	synctest.Test(t, func(t *testing.T) {
		quiet := slog.New(slog.DiscardHandler)
		heads := new(oneHead)
		w, err := audit.OpenWitness(t.TempDir(), heads)
		if err != nil {
			t.Fatal(err)
		}
		// signed makes a log, has it signed, and returns its lines.
		signed := func(n int) [][]byte {
			time.Sleep(2 * time.Minute) // as far as two logs of one name must be apart
			path := filepath.Join(t.TempDir(), "audit.jsonl")
			l, err := audit.Open(audit.Config{Path: path, Log: quiet})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for range n {
				if err := l.Append(&audit.Record{Kind: audit.KindAdmin}); err != nil {
					t.Fatal(err)
				}
			}
			tree, err := audit.OpenTree(l)
			if err := errors.Join(err, l.Sync(t.Context()), tree.Update()); err != nil {
				t.Fatal(err)
			}
			name := audit.LogName(workload, agent)
			q, _, err := tree.Ask(name, 0)
			if err != nil {
				t.Fatal(err)
			}
			if b, _, err := w.Cosign(t.Context(), name, q); b == nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			return slices.Collect(bytes.Lines(b))
		}
		m, err := audit.OpenMirror(audit.Config{Path: path, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		for _, n := range []int{30, 20} {
			if err := m.Receive(t.Context(), signed(n)); err != nil {
				t.Fatal(err)
			}
		}
		h, err := audit.ParseHead(heads.b)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(knownHeads{Witnesses: []string{w.Key()}, Heads: []audit.Head{h}})
		if err := errors.Join(err, os.WriteFile(file, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	})
	verify := func(code int, wants ...string) {
		t.Helper()
		var out bytes.Buffer
		err := run(t.Context(), []string{"audit", "verify", dir, "--heads", file}, &out, io.Discard)
		got := 0
		if e := (*daemon.ExitError)(nil); errors.As(err, &e) {
			got = e.Code
		} else if err != nil {
			t.Fatal(err)
		}
		text := strings.Join(strings.Fields(out.String()), " ")
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%q is not in\n%s", want, &out)
			}
		}
		if got != code {
			t.Errorf("exit code %d, want %d:\n%s", got, code, &out)
		}
	}
	old := base + ".old-1"
	verify(0, base+" completeness pass up to record 20", old+" completeness pass up to record 30", old+" identity pass "+workload.String())
	if err := os.WriteFile(path+".loose", []byte("a\nb\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	verify(3, base+".loose all unconfirmed not covered: 2 lines that do not continue the copy")
	whole, err := os.ReadFile(filepath.Join(dir, old))
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(whole, []byte("\n"))
	for name, tt := range map[string]struct {
		b    []byte
		code int
		want string
	}{
		"its end cut off": {bytes.Join(lines[:20], nil), 3, old + " completeness unconfirmed nothing missing in between, but no witness has signed this log"},
		"a line changed":  {bytes.Replace(whole, []byte(`"kind":"admin"`), []byte(`"kind":"gap"`), 1), 1, old + " integrity FAIL"},
	} {
		t.Log(name)
		if err := os.WriteFile(filepath.Join(dir, old), tt.b, 0o600); err != nil {
			t.Fatal(err)
		}
		verify(tt.code, tt.want)
	}
}
