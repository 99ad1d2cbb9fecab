package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long a file must be quiet before it is looked at: editors
	// and checkouts write in several steps. Whoever must not read half of what
	// takes longer reads again until nothing changes.
	settle = 25 * time.Millisecond
	// restless bounds the wait when writes never stop.
	restless = 500 * time.Millisecond
	// hashUpTo is the size up to which content decides whether a file changed.
	// Policy and configuration are far smaller; larger ones go by size and time.
	hashUpTo = 4 << 20
)

// Watch calls fn when the content of path changes, and once at the start, so
// that no edit between the caller's first read and the watch is lost. Path is
// a file or a directory with all that lies in it; it may be replaced by rename
// or reached through symbolic links, and need not exist yet. Content is
// compared, so touching a file calls nothing.
//
// Changes come by inotify, and by looking every poll (default 30 s) where
// inotify sees nothing, such as on network file systems. Fn runs on the
// goroutine of Watch, which returns nil when ctx ends.
func Watch(ctx context.Context, path string, poll time.Duration, fn func()) error {
	if poll <= 0 {
		poll = 30 * time.Second
	}
	path = filepath.Clean(path)
	w := &watcher{path: path, dirs: make(map[string]bool)}
	// Without inotify (its limits are per user and run out) the poll remains.
	if n, err := fsnotify.NewWatcher(); err == nil {
		defer n.Close()
		w.notify, w.events, w.errs = n, n.Events, n.Errors
	}
	w.follow()
	last := w.fingerprint()
	fn()

	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	quiet := time.NewTimer(0)
	<-quiet.C
	var first time.Time // of the events that are not yet handled
	look := func() {
		first = time.Time{}
		w.follow()
		if now := w.fingerprint(); now != last {
			last = now
			fn()
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.events:
			if !ok {
				w.events = nil
				continue
			}
			if !w.concerns(e) {
				continue
			}
			now := time.Now()
			if first.IsZero() {
				first = now
			}
			quiet.Reset(min(settle, max(0, restless-now.Sub(first))))
		case _, ok := <-w.errs:
			// An overflow of the event queue: what was lost is found by looking.
			if !ok {
				w.errs = nil
				continue
			}
			quiet.Reset(settle)
		case <-quiet.C:
			look()
		case <-ticker.C:
			look()
		}
	}
}

type watcher struct {
	path   string
	notify *fsnotify.Watcher
	events chan fsnotify.Event
	errs   chan error
	dirs   map[string]bool
}

// concerns filters the noise of the parent directory away from a watched
// directory. For a file, anything beside it may be the link that leads to it.
func (w *watcher) concerns(e fsnotify.Event) bool {
	if e.Op == fsnotify.Chmod {
		return false
	}
	return !w.dirs[w.path] || e.Name == w.path || w.dirs[filepath.Dir(e.Name)]
}

// follow watches the parent of path and every directory in it, new ones too.
// Inotify forgets a directory that is replaced, so all are added each time.
func (w *watcher) follow() {
	if w.notify == nil {
		return
	}
	clear(w.dirs)
	w.notify.Add(filepath.Dir(w.path))
	if info, err := os.Stat(w.path); err != nil || !info.IsDir() {
		return
	}
	walkDirs(w.path, func(dir string) {
		w.notify.Add(dir)
		w.dirs[dir] = true
	})
}

// walkDirs visits root and the directories in it. Root may be a link to a
// directory; links inside are not followed, they could form a circle.
func walkDirs(root string, visit func(dir string)) {
	visit(root)
	entries, err := os.ReadDir(root)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			walkDirs(filepath.Join(root, e.Name()), visit)
		}
	}
}

// fingerprint sums up the names and contents below path. What cannot be read
// counts with its error, so that it is noticed when it can be read again.
func (w *watcher) fingerprint() [sha256.Size]byte {
	h := sha256.New()
	info, err := os.Stat(w.path)
	switch {
	case err != nil:
		fmt.Fprintf(h, "error %v", err)
	case !info.IsDir():
		sumFile(h, w.path, info)
	default:
		walkDirs(w.path, func(dir string) { sumDir(h, dir) })
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func sumDir(h hash.Hash, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		fmt.Fprintf(h, "dir %q error %v\n", dir, err)
		return
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Gone between the two calls; its event follows.
		case err != nil:
			fmt.Fprintf(h, "file %q error %v\n", path, err)
		case !info.IsDir():
			sumFile(h, path, info)
		}
	}
}

func sumFile(h hash.Hash, path string, info fs.FileInfo) {
	if !info.Mode().IsRegular() || info.Size() > hashUpTo {
		fmt.Fprintf(h, "file %q %d\n%v %v\n", path, info.Size(), info.Mode(), info.ModTime())
		return
	}
	f, err := os.Open(path)
	if err != nil {
		fmt.Fprintf(h, "file %q %d\nerror %v\n", path, info.Size(), err)
		return
	}
	defer f.Close()
	if now, err := f.Stat(); err == nil { // another may have come in the place of what was looked at
		info = now
	}
	fmt.Fprintf(h, "file %q %d\n", path, info.Size())
	if _, err := io.Copy(h, io.LimitReader(f, hashUpTo)); err != nil {
		fmt.Fprintf(h, "error %v\n", err)
	}
}
