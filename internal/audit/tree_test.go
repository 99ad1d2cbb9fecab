package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func treeAt(t testing.TB, log *Log) *Tree {
	t.Helper()
	tree, err := OpenTree(log)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func mustUpdate(t testing.TB, log *Log, tree *Tree) {
	t.Helper()
	if err := log.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tree.Update(); err != nil {
		t.Fatal(err)
	}
}

// stored is the reference: all hashes of a tree as package tlog keeps them.
type stored []tlog.Hash

func (s *stored) add(t testing.TB, n int64, leaf tlog.Hash) {
	t.Helper()
	hs, err := tlog.StoredHashesForRecordHash(n, leaf, s)
	if err != nil {
		t.Fatal(err)
	}
	*s = append(*s, hs...)
}

func (s *stored) ReadHashes(at []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(at))
	for i, x := range at {
		out[i] = (*s)[x]
	}
	return out, nil
}

func TestEdgeAgreesWithTlog(t *testing.T) {
	var e edge
	var ref stored
	full := 0
	for n := range int64(70_000) {
		if n < 600 || n > 65_000 && n < 66_000 || n%977 == 0 {
			want, err := tlog.TreeHash(n, &ref)
			if err != nil {
				t.Fatal(err)
			}
			if got := e.root(); got != want {
				t.Fatalf("root of %d leaves is %v, want %v", n, got, want)
			}
		}
		leaf := tlog.RecordHash(fmt.Append(nil, n))
		ref.add(t, n, leaf)
		if err := e.add(leaf, func(int, uint64, []tlog.Hash) error { full++; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if full != 70_000/256+1 {
		t.Errorf("%d tiles became full", full)
	}
}

func TestTilePaths(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "tile/0/000", 5: "tile/0/005", 1234067: "tile/0/x001/x234/067", 999: "tile/0/999", 1000: "tile/0/x001/000",
	} {
		if got := tilePath(0, n); got != want {
			t.Errorf("tile %d is at %s, want %s", n, got, want)
		}
		ref := tlog.Tile{H: 8, L: 0, N: int64(n), W: 256}.Path()
		if "tile/"+strings.TrimPrefix(ref, "tile/8/") != want {
			t.Errorf("package tlog says %s", ref)
		}
	}
}

func TestTreeFollowsTheLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	log, err := Open(Config{Path: path, Log: quiet(), MaxFile: 50_000})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	tree := treeAt(t, log)
	var sizes []uint64
	for range 12 {
		mustAppend(t, log, 1+rand.IntN(150))
		mustUpdate(t, log, tree)
		sizes = append(sizes, tree.Size())
		if rand.IntN(3) == 0 {
			key := tree.Key()
			if tree = treeAt(t, log); tree.Key() != key {
				t.Fatal("another key after a restart")
			}
		}
	}
	q, _, err := tree.Ask("me", 0)
	if err != nil {
		t.Fatal(err)
	}
	now, err := OpenCheckpoint(q.Checkpoint, q.Key)
	if err != nil {
		t.Fatal(err)
	}
	var ref stored
	n := int64(0)
	if err := log.lines(0, now.Size, func(b []byte) error { ref.add(t, n, tlog.RecordHash(b)); n++; return nil }); err != nil {
		t.Fatal(err)
	}
	if want, _ := tlog.TreeHash(n, &ref); tlog.Hash(now.Root) != want || n != int64(now.Size) {
		t.Fatalf("root of %d records is %x, want %v", n, now.Root, want)
	}
	for _, old := range sizes {
		q, _, err := tree.Ask("me", old)
		if err != nil {
			t.Fatal(err)
		}
		p, _ := parseHashes(q.Proof)
		root, _ := tlog.TreeHash(int64(old), &ref)
		if old < now.Size {
			if err := tlog.CheckTree(p, n, tlog.Hash(now.Root), int64(old), root); err != nil {
				t.Errorf("from %d to %d: %v", old, now.Size, err)
			}
		}
	}
	partial, _ := filepath.Glob(filepath.Join(tree.dir, "tile/0/*.p/*"))
	want := 1
	if n%tileWidth == 0 { // it ends with a whole one
		want = 0
	}
	if len(partial) != want {
		t.Errorf("narrow tiles are left of %d records: %v", n, partial)
	}
}

func TestTreeMendsItsTiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	log := openAt(t, path)
	tree := treeAt(t, log)
	mustAppend(t, log, 300)
	mustUpdate(t, log, tree)
	want := mustRead(t, filepath.Join(tree.dir, checkpointFile))
	name := filepath.Join(tree.dir, "tile/0/001.p/44")
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func() error{
		"a flipped bit": func() error { b[7] ^= 1; return os.WriteFile(name, b, 0o600) },
		"a short tile":  func() error { return os.WriteFile(name, b[:100], 0o600) },
		"no tile":       func() error { return os.RemoveAll(filepath.Dir(name)) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		again := treeAt(t, log)
		mustAppend(t, log, 1)
		mustUpdate(t, log, again)
		if _, _, err := again.Ask("me", 300); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	c, err := OpenCheckpoint(want, tree.Key())
	if err != nil || c.Size != 300 {
		t.Fatal(c, err)
	}
}

func TestTreeNoticesWhatWasCutOrChanged(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(b []byte) []byte
		want string
	}{
		{"the end was cut off", func(b []byte) []byte { return cutLines(b, 5) }, "were cut off"},
		{"another log took its place", func([]byte) []byte {
			l := NewMemory()
			mustAppend(t, l, 30)
			return l.Lines()
		}, "were changed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			log := openAt(t, path)
			tree := treeAt(t, log)
			mustAppend(t, log, 20)
			mustUpdate(t, log, tree)
			log.Close()
			if err := os.WriteFile(path, tt.do(mustRead(t, path)), 0o600); err != nil {
				t.Fatal(err)
			}
			os.RemoveAll(filepath.Join(tree.dir, "tile")) // as one would who can write
			if _, err := OpenTree(openAt(t, path)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("opened with %v, want %q", err, tt.want)
			}
		})
	}
}

func cutLines(b []byte, n int) []byte {
	lines := strings.SplitAfter(string(b), "\n")
	return []byte(strings.Join(lines[:len(lines)-1-n], ""))
}

// memHeads is a Heads in memory.
type memHeads struct {
	mu sync.Mutex
	m  map[string][]byte
	at map[string]int64
}

func (h *memHeads) Load(_ context.Context, name string) ([]byte, int64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.m[name], h.at[name], nil
}

func (h *memHeads) Save(_ context.Context, name string, b []byte, rev int64) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.m == nil {
		h.m, h.at = map[string][]byte{}, map[string]int64{}
	}
	if h.at[name] != rev {
		return false, nil
	}
	h.m[name], h.at[name] = b, rev+1
	return true, nil
}

func ask(t testing.TB, w *Witness, tree *Tree, old uint64) (signed []byte, have uint64, err error) {
	t.Helper()
	q, _, err := tree.Ask("billing", old)
	if err != nil {
		t.Fatal(err)
	}
	return w.Cosign(t.Context(), "billing", q)
}

func TestWitness(t *testing.T) {
	heads := &memHeads{}
	w, err := OpenWitness(t.TempDir(), heads)
	if err != nil {
		t.Fatal(err)
	}
	other, err := OpenWitness(t.TempDir(), heads) // another issuer on the same store
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	log := openAt(t, path)
	tree := treeAt(t, log)
	mustAppend(t, log, 300)
	mustUpdate(t, log, tree)
	fork, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	key := tree.key.named("billing").verifier()
	signed, have, err := ask(t, w, tree, 0)
	if err != nil || have != 300 || signed == nil {
		t.Fatal(have, err)
	}
	if c, at, err := OpenCosigned(signed, key, []string{other.Key(), w.Key()}); err != nil || c.Size != 300 || at.IsZero() {
		t.Errorf("%+v %v %v", c, at, err)
	}
	if _, _, err := OpenCosigned(signed, key, []string{other.Key()}); err == nil {
		t.Error("signed by a witness that has not")
	}
	mustAppend(t, log, 400)
	mustUpdate(t, log, tree)
	if signed, have, err := ask(t, other, tree, 0); signed != nil || have != 300 || err != nil {
		t.Errorf("an old start: %q %d %v; want to be told 300", signed, have, err)
	}
	if signed, have, err := ask(t, other, tree, 300); signed == nil || have != 700 || err != nil {
		t.Errorf("%q %d %v; want it signed", signed, have, err)
	}

	forge := func(records []byte) *Tree { // the same key on another history
		p := filepath.Join(t.TempDir(), "audit.log")
		if err := os.WriteFile(p, records, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(TreeDir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		key := mustRead(t, filepath.Join(tree.dir, keyFile))
		if err := os.WriteFile(filepath.Join(TreeDir(p), keyFile), key, 0o600); err != nil {
			t.Fatal(err)
		}
		l := openAt(t, p)
		forged := treeAt(t, l)
		mustAppend(t, l, 1)
		mustUpdate(t, l, forged)
		return forged
	}
	cut := forge(fork)
	if signed, have, err := ask(t, w, cut, 0); signed != nil || have != 700 || err != nil {
		t.Errorf("a log that was cut, by who does not say what it knows: %q %d %v", signed, have, err)
	}
	if _, _, err := ask(t, w, cut, 700); !errors.Is(err, ErrCut) {
		t.Errorf("a log that was cut: %v", err)
	}
	mustAppend(t, cut.log, 700-int(cut.Size())) // at once: what comes below is to come within the minute
	mustUpdate(t, cut.log, cut)
	if _, _, err := ask(t, w, cut, 700); !errors.Is(err, ErrForked) {
		t.Errorf("another log of the same size: %v", err)
	}
	mustAppend(t, cut.log, 7)
	mustUpdate(t, cut.log, cut)
	if _, _, err := ask(t, w, cut, 700); !errors.Is(err, ErrForked) {
		t.Errorf("a longer fork: %v", err)
	}

	fresh := openAt(t, filepath.Join(t.TempDir(), "audit.log"))
	wiped := treeAt(t, fresh)
	mustAppend(t, fresh, 3)
	mustUpdate(t, fresh, wiped)
	if signed, _, err := ask(t, w, wiped, 0); !errors.Is(err, ErrTooSoon) || signed != nil {
		t.Errorf("a new log a moment after the one before: %v", err)
	}
	later := func() time.Time { return time.Now().Add(logsApart + time.Second) }
	w.key.now, other.key.now = later, later
	if signed, _, err := ask(t, w, wiped, 0); !errors.Is(err, ErrOtherLog) || signed == nil {
		t.Errorf("a new log in the place of one: %v", err)
	}
	if signed, have, err := ask(t, w, wiped, 3); err != nil || signed == nil {
		t.Errorf("the new log again: %d %v", have, err)
	}
	q, _, _ := tree.Ask("payment", 0)
	if signed, _, err := w.Cosign(t.Context(), "billing", q); !errors.Is(err, ErrWrongName) || signed != nil {
		t.Errorf("the log of another: %v", err)
	}
	w.key.now = func() time.Time { return time.Now().Add(3 * logsApart) }
	if _, _, err := ask(t, w, cut, 700); !errors.Is(err, ErrForked) {
		t.Errorf("the earlier log, forked, after another came between: %v", err)
	}
}

func TestCheckpointsThatAreRefused(t *testing.T) {
	log := openAt(t, filepath.Join(t.TempDir(), "audit.log"))
	tree := treeAt(t, log)
	mustAppend(t, log, 3)
	mustUpdate(t, log, tree)
	good := mustRead(t, filepath.Join(tree.dir, checkpointFile))
	sign := func(text string) []byte {
		b, err := note.Sign(&note.Note{Text: text}, tree.key)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	root := strings.Split(string(good), "\n")[2]
	for name, b := range map[string][]byte{
		"nothing":            nil,
		"another size":       []byte(strings.Replace(string(good), "\n3\n", "\n4\n", 1)),
		"a signed bad size":  sign(tree.key.name + "\n03\n" + root + "\n"),
		"a negative size":    sign(tree.key.name + "\n-3\n" + root + "\n"),
		"another origin":     sign("other\n3\n" + root + "\n"),
		"a further line":     sign(tree.key.name + "\n3\n" + root + "\nmore\n"),
		"a short hash":       sign(tree.key.name + "\n3\nAAAA\n"),
		"more than is read ": append(good, make([]byte, maxCheckpoint)...),
	} {
		if c, err := OpenCheckpoint(b, tree.Key()); err == nil {
			t.Errorf("%s is accepted: %+v", name, c)
		}
	}
	if c, err := OpenCheckpoint(good, tree.Key()); err != nil || c.Size != 3 {
		t.Error(c, err)
	}
}

func FuzzCheckpoint(f *testing.F) {
	sum := sha256.Sum256(nil)
	f.Add(Checkpoint{Origin: "o", Size: 4, Root: sum}.text())
	f.Fuzz(func(t *testing.T, text string) {
		if c, err := parseCheckpoint(text); err == nil && c.text() != text {
			t.Errorf("%q is read as %+v", text, c)
		}
	})
}
