package audit

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var errDisk = errors.New("input/output error")

// unsynced is a file whose next fsync fails.
type unsynced struct{ *os.File }

func (unsynced) Sync() error { return errDisk }

// failSync has the next fsync of a log fail.
func failSync(t *testing.T, l *Log) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	f, ok := l.file.(*os.File)
	if !ok {
		t.Fatalf("the file is a %T", l.file)
	}
	l.file = unsynced{f}
}

// TestFailedSyncIsMended: after a failed fsync what was appended is written into
// another file, and goes on there; what was refused meanwhile is counted.
func TestFailedSyncIsMended(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	l, err := Open(Config{Path: path, Log: quiet(), MaxFile: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	tail, _ := OpenTail(path, 0)
	defer tail.Close()
	mustAppend(t, l, 20)
	if err := l.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, 2)
	readUpTo(t, tail, 22)
	was, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	failSync(t, l)
	if err := l.Sync(t.Context()); !errors.Is(err, errDisk) || l.Durable() != 20 {
		t.Fatalf("%v, %d on the disk", err, l.Durable())
	}
	for range 3 {
		r := sample()
		if err := l.Append(&r); !errors.Is(err, errDisk) || refusalID(t, r.ID) == 0 {
			t.Fatalf("appended after a failed sync: %v %+v", err, r)
		}
	}
	if err := l.Healthy(); !errors.Is(err, errDisk) {
		t.Errorf("healthy: %v", err)
	}
	if err := l.Sync(t.Context()); err != nil || l.Durable() != 22 || l.Healthy() != nil {
		t.Fatalf("not mended: %v, %d on the disk", err, l.Durable())
	}
	if now, err := os.Stat(path); err != nil || os.SameFile(was, now) {
		t.Errorf("the file is the one that failed: %v", err)
	}
	mustAppend(t, l, 30)
	readUpTo(t, tail, 53)
	if rep := mustVerify(t, path, 53); rep.Gaps != 1 {
		t.Errorf("%+v", rep)
	}
	if rs := readRecords(t, path); rs[22].Reason != reasonRefused || rs[22].Count != 3 {
		t.Errorf("%+v", rs[22])
	}
	l.Close()
	mustAppend(t, openAt(t, path), 1)
	mustVerify(t, path, 54)
}

// TestDroppedPagesAreNotMended: what the kernel has dropped cannot be written
// again. The log takes nothing, and is left as it is.
func TestDroppedPagesAreNotMended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		l := openAt(t, path)
		mustAppend(t, l, 3)
		failSync(t, l)
		if err := l.Sync(t.Context()); !errors.Is(err, errDisk) {
			t.Fatal(err)
		}
		whole := mustRead(t, path)
		at := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
		for name, b := range map[string][]byte{"zeros": append(bytes.Clone(whole[:at]), make([]byte, len(whole)-at)...), "less": whole[:at]} {
			time.Sleep(mendEvery)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			r := sample()
			if err := l.Sync(t.Context()); !errors.Is(err, errDisk) || !errors.Is(l.Append(&r), errDisk) || !bytes.Equal(mustRead(t, path), b) {
				t.Errorf("%s: %v", name, err)
			}
			if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
				t.Errorf("%s: %q is left", name, left)
			}
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := l.Sync(t.Context()); !errors.Is(err, errDisk) {
			t.Errorf("tried again at once: %v", err)
		}
		time.Sleep(mendEvery)
		if err := l.Sync(t.Context()); err != nil {
			t.Errorf("not mended though all is there: %v", err)
		}
		mustVerify(t, path, 4)
	})
}

// slowSync is a file whose fsync waits, and then fails once.
type slowSync struct {
	*os.File
	began, end chan struct{}
}

func (f *slowSync) Sync() error {
	close(f.began)
	<-f.end
	return errDisk
}

// TestNoFileGoesAsideWhileItIsSynced: of two fsyncs at once the kernel tells a
// failure to one. The file is full while one is under way that fails: it is
// written anew as a whole, and put aside after that.
func TestNoFileGoesAsideWhileItIsSynced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(Config{Path: path, Log: quiet(), MaxFile: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	mustAppend(t, l, 2)
	held, err := os.Open(path) // so that no other file gets its number
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	was, err := held.Stat()
	if err != nil {
		t.Fatal(err)
	}
	slow := &slowSync{began: make(chan struct{}), end: make(chan struct{})}
	l.mu.Lock()
	slow.File = l.file.(*os.File)
	l.file = slow
	l.mu.Unlock()
	synced := make(chan error, 1)
	go func() { synced <- l.Sync(t.Context()) }()
	<-slow.began
	mustAppend(t, l, 40)
	if names := mustGlob(t, path+".*"); len(names) > 0 {
		t.Errorf("put aside while it is brought to the disk: %v", names)
	}
	close(slow.end)
	if err := <-synced; !errors.Is(err, errDisk) || l.Durable() != 0 {
		t.Fatalf("%v, %d on the disk", err, l.Durable())
	}
	if err := l.Sync(t.Context()); err != nil || l.Durable() != 42 {
		t.Fatalf("not mended: %v, %d on the disk", err, l.Durable())
	}
	mustAppend(t, l, 1)
	names, err := Segments(path)
	if err != nil || len(names) != 2 {
		t.Fatalf("%v %v", names, err)
	}
	for _, name := range names {
		if now, err := os.Stat(name); err != nil || os.SameFile(was, now) {
			t.Errorf("%s is the file that failed: %v", filepath.Base(name), err)
		}
	}
	mustVerify(t, path, 43)
}

// TestAFullFileGoesAsideAfterItsSync, though nobody writes any more.
func TestAFullFileGoesAsideAfterItsSync(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(Config{Path: path, Log: quiet(), MaxFile: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	slow := &gatedSync{began: make(chan struct{}), end: make(chan struct{})}
	l.mu.Lock()
	slow.File = l.file.(*os.File)
	l.file = slow
	l.mu.Unlock()
	mustAppend(t, l, 2)
	synced := make(chan error, 1)
	go func() { synced <- l.Sync(t.Context()) }()
	<-slow.began
	mustAppend(t, l, 40)
	close(slow.end)
	if err := <-synced; err != nil {
		t.Fatal(err)
	}
	if names := mustGlob(t, path+".*"); len(names) != 1 || l.Durable() != 42 {
		t.Errorf("%v, %d on the disk", names, l.Durable())
	}
	mustAppend(t, l, 1)
	mustVerify(t, path, 43)
}

// gatedSync is a file whose first fsync waits.
type gatedSync struct {
	*os.File
	began, end chan struct{}
	once       sync.Once
}

func (f *gatedSync) Sync() error {
	f.once.Do(func() { close(f.began); <-f.end })
	return f.File.Sync()
}

// TestRunMends: nobody has to call.
func TestRunMends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := openAt(t, filepath.Join(t.TempDir(), "audit.log"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		mustAppend(t, l, 2)
		failSync(t, l)
		time.Sleep(time.Second)
		mustAppend(t, l, 1)
		time.Sleep(time.Second)
		if l.Durable() != 3 {
			t.Errorf("%d records are on the disk", l.Durable())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestMirrorMends(t *testing.T) {
	m := mirrorAt(t, filepath.Join(t.TempDir(), "copy"))
	lines := linesOf(t, 5)
	mustReceive(t, m, lines[:2], 2)
	failSync(t, m.log)
	if err := m.Receive(t.Context(), lines[2:4]); !errors.Is(err, errDisk) {
		t.Fatal(err)
	}
	mustReceive(t, m, lines[2:], 5)
	mustVerify(t, m.cfg.Path, 5)
}
