package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

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
		files, err := settled(t.Context(), func() (*mesh.Files, error) {
			if n++; n == 2 {
				write("guardrails.csv", guard)
			}
			return folder.Read()
		}, nil)
		if err != nil || n != 3 {
			t.Fatalf("%d readings, %v; want 3", n, err)
		}
		if p, err := folder.Parse(files); err != nil || len(p.Rules) != 1 {
			t.Errorf("got %+v, %v; want the guardrail", p, err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		n := 0
		_, err := settled(t.Context(), func() (*mesh.Files, error) {
			n++
			write("guardrails.csv", map[bool]string{true: guard, false: ""}[n%2 == 0])
			return folder.Read()
		}, nil)
		if !errors.Is(err, errRestless) {
			t.Errorf("a folder that never rests: %v", err)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := settled(ctx, folder.Read, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("stopping: %v", err)
	}
}

// TestACheckoutIsTakenWhole: it removes a file and writes another one in its
// place, which is half there when it is read first.
func TestACheckoutIsTakenWhole(t *testing.T) {
	folder := &mesh.Folder{Dir: t.TempDir(), TrustDomain: spiffeid.RequireTrustDomainFromString("corp.example")}
	path := filepath.Join(folder.Dir, "guardrails.csv")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Error(err) // also called from a timer
		}
	}
	if err := os.WriteFile(filepath.Join(folder.Dir, "access.csv"), []byte("# nothing is allowed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		write("# no guardrail yet\n")
		before, err := folder.Read()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		write("# half of it\n")
		// Longer than a file that is moved there is given.
		time.AfterFunc(2*settle, func() { write("# half of it\n" + guard) })
		files, err := settled(t.Context(), folder.Read, before)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := folder.Parse(files); err != nil || len(p.Rules) != 1 {
			t.Errorf("got %+v, %v; want the guardrail", p, err)
		}
	})
}

// TestOneWhoWritesInPlaceIsGivenLonger than one who moves files there.
func TestOneWhoWritesInPlaceIsGivenLonger(t *testing.T) {
	folder := &mesh.Folder{Dir: t.TempDir(), TrustDomain: spiffeid.RequireTrustDomainFromString("corp.example")}
	path := filepath.Join(folder.Dir, "access.csv")
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
	write(path, "# one\n")
	synctest.Test(t, func(t *testing.T) {
		var before *mesh.Files
		for _, step := range []struct {
			name string
			edit func()
			want time.Duration
		}{
			{"the first reading", func() {}, settleInPlace},
			{"nothing new", func() {}, settle},
			{"written in place", func() { write(path, "# two\n") }, settleInPlace},
			{"made anew in place, as by a checkout", func() {
				if err := os.Remove(path); err != nil {
					t.Error(err)
				}
				write(path, "# three\n")
			}, settleInPlace},
			{"moved", func() {
				write(path+".go", "# four\n")
				if err := os.Rename(path+".go", path); err != nil {
					t.Error(err)
				}
				// It was written a while ago, by the clock of the bubble.
				if err := os.Chtimes(path, time.Time{}, time.Now().Add(-settleInPlace)); err != nil {
					t.Error(err)
				}
			}, settle},
		} {
			step.edit()
			start := time.Now()
			files, err := settled(t.Context(), folder.Read, before)
			if err != nil || time.Since(start) != step.want {
				t.Errorf("%s: after %s, %v; want %s", step.name, time.Since(start), err, step.want)
			}
			before = files
		}
	})
}
