package archive

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// uploadedFile says which segment was uploaded last.
const uploadedFile = "uploaded"

// lookEvery is how often Run looks at what time asks for.
const lookEvery = 5 * time.Second

// Run does what time asks for until ctx ends, and closes the archive.
func (a *Archive) Run(ctx context.Context) error {
	t := time.NewTicker(min(lookEvery, max(a.cfg.RotateAfter/4, 10*time.Millisecond)))
	defer t.Stop()
	for {
		a.look(ctx)
		select {
		case <-ctx.Done():
			return a.Close()
		case <-t.C:
		case <-a.changed:
		}
	}
}

// look closes a segment that is old enough, uploads, and removes.
func (a *Archive) look(ctx context.Context) {
	a.mu.Lock()
	var err error
	if a.open != nil && time.Since(a.open.link.Time) >= a.cfg.RotateAfter {
		err = a.seal(false)
	}
	a.mu.Unlock()
	if err != nil {
		a.cfg.Log.Error("a segment of the archive cannot be closed", "archive", a.cfg.Name, "err", err)
	}
	if err := a.upload(ctx); err != nil && ctx.Err() == nil {
		a.cfg.Log.Warn("the archive cannot be uploaded", "archive", a.cfg.Name, "err", err)
	}
	if err := a.retain(time.Now()); err != nil {
		a.cfg.Log.Error("old segments of the archive cannot be removed", "archive", a.cfg.Name, "err", err)
	}
}

// uploaded is the segment that was uploaded last; all are when nothing is.
func (a *Archive) uploaded() (string, error) {
	b, err := os.ReadFile(a.path(uploadedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// upload copies what is new: the segments, and when they are there the chain
// and its head.
func (a *Archive) upload(ctx context.Context) error {
	if a.cfg.Upload == nil {
		return nil
	}
	last, err := a.uploaded()
	if err != nil {
		return err
	}
	a.mu.Lock()
	segs := a.chain.live()
	a.mu.Unlock()
	sent := false
	for _, l := range segs {
		if l.File <= last {
			continue
		}
		if err := a.uploadFile(ctx, l.File); err != nil {
			return err
		}
		if err := replaceFile(a.path(uploadedFile), []byte(l.File+"\n")); err != nil {
			return err
		}
		sent = true
	}
	if !sent {
		return nil
	}
	names := []string{keyFile, chainFile, headFile}
	var texts [3][]byte
	a.mu.Lock() // the head must be that of the chain
	for i, f := range names {
		if texts[i], err = os.ReadFile(a.path(f)); err != nil {
			break
		}
	}
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, uploadWithin)
	defer cancel()
	for i, f := range names {
		if err == nil {
			err = a.cfg.Upload(ctx, f, bytes.NewReader(texts[i]), int64(len(texts[i])))
		}
	}
	return err
}

// uploadWithin bounds one upload: a place that hangs must not keep segments open.
const uploadWithin = 2 * time.Minute

func (a *Archive) uploadFile(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, uploadWithin)
	defer cancel()
	f, err := os.Open(a.path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return a.cfg.Upload(ctx, name, f, st.Size())
}

// retain removes the oldest segments, and says in the chain that it has.
func (a *Archive) retain(now time.Time) error {
	last, err := a.uploaded()
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	segs := a.chain.live()
	var held int64
	for _, l := range segs {
		held += l.Bytes
	}
	var gone []string
	a.full = false
	for _, l := range segs {
		over := held > a.cfg.KeepBytes
		if !over && now.Sub(l.Last) < a.cfg.KeepFor {
			break
		}
		if a.cfg.Upload != nil && l.File > last {
			a.full = over
			break
		}
		gone = append(gone, l.File)
		held -= l.Bytes
	}
	for some := range slices.Chunk(gone, 500) {
		if err := a.appendLink(Link{Time: now.UTC(), Removed: some}); err != nil {
			return err
		}
		for _, f := range some {
			if err := os.Remove(a.path(f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := a.sign(); err != nil {
			return err
		}
	}
	return nil
}
