package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const guard = "p, guard, in, **, spiffe://corp.example/ns/shop/sa/billing, *, *, /admin/**, -, deny\n"

// A file that is written in place is empty for a moment, which would be a valid
// set without a guardrail.
func TestAHalfWrittenFolderIsNotTaken(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("corp.example")
	dir := t.TempDir()
	folder := &mesh.Folder{Dir: dir, TrustDomain: td}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("access.csv", "# nothing is allowed\n")
	write("guardrails.csv", "")
	synctest.Test(t, func(t *testing.T) {
		n := 0
		p, err := settled(t.Context(), func() (*mesh.Policies, mesh.Sum, error) {
			if n++; n == 2 {
				write("guardrails.csv", guard)
			}
			return folder.Parse()
		})
		if err != nil || len(p.Rules) != 1 || n != 3 {
			t.Errorf("%d readings gave %+v, %v; want the guardrail after 3", n, p, err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		n := 0
		_, err := settled(t.Context(), func() (*mesh.Policies, mesh.Sum, error) {
			n++
			write("guardrails.csv", map[bool]string{true: guard, false: ""}[n%2 == 0])
			return folder.Parse()
		})
		if !errors.Is(err, errRestless) {
			t.Errorf("a folder that never rests: %v", err)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := settled(ctx, folder.Parse); !errors.Is(err, context.Canceled) {
		t.Errorf("stopping: %v", err)
	}
}
