package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// sweepEvery is how often the copies are looked at.
const sweepEvery = time.Minute

// sweep keeps the copies by the rule that the issuer keeps its own log by, until
// ctx ends. The issuer's log has the records of what was removed, and its witness
// signs the evidence. Nobody gets the copies from here, so that the rule must say
// that they may go.
func (r *received) sweep(ctx context.Context, w *audit.Witness, into *audit.Log) error {
	said := map[string]string{}
	// A copy comes after what is signed of its log: by the next time it has
	// that, and the head is then ahead again.
	before := map[string][]audit.Head{}
	for r.keep.Set() && r.keep.WithoutSink && ctx.Err() == nil {
		names, err := r.due(time.Now())
		if err != nil {
			r.log.Error("received audit records not looked through for old ones; trying again", "err", err)
		}
		var all []audit.Head
		if err == nil && len(names) > 0 {
			if all, err = r.signed(ctx); err != nil && ctx.Err() == nil {
				r.log.Error("heads of audit logs not read, so that no copy is removed; trying again", "err", err)
				names = nil
			}
		}
		for _, name := range names {
			text := ""
			now, _ := audit.HeadsOf(all, copyOf.FindString(name))
			heads := append(slices.Clone(now), before[name]...)
			before[name] = now
			if err := r.sweepOne(ctx, filepath.Join(r.dir, name), w, heads, into); err != nil && ctx.Err() == nil {
				if text = err.Error(); text != said[name] {
					r.log.Error("old received audit records not removed; trying again", "copy", name, "err", err)
				}
			}
			said[name] = text
		}
		daemon.Pause(ctx, sweepEvery)
	}
	return nil
}

// sweepOne keeps one copy by the rule, also if its proxy has not come since the
// start.
func (r *received) sweepOne(ctx context.Context, path string, w *audit.Witness, heads []audit.Head, into *audit.Log) error {
	r.mu.Lock()
	var c *copied
	for _, each := range r.copies {
		if each.path == path {
			c = each
		}
	}
	r.mu.Unlock()
	if c != nil {
		c.mu.Lock()
		m := c.mirror
		c.mu.Unlock()
		if m == nil {
			return nil // the issuer is stopping
		}
		return m.Sweep(ctx, r.keep, w, heads, into)
	}
	m, err := audit.OpenMirror(audit.Config{Path: path, Log: r.log, MaxFile: r.keep.MaxFile()})
	if errors.Is(err, audit.ErrLocked) {
		return nil // its proxy has just come
	}
	if err != nil {
		return err
	}
	return errors.Join(m.Sweep(ctx, r.keep, w, heads, into), m.Close())
}

// logFile divides the name of a file into that of its log, which is a copy or
// what was kept of one that started again, and the number of a file put aside.
var logFile = regexp.MustCompile(`^(.+\.jsonl(?:\.old-[0-9]+)?)(\.[0-9]{20})?$`)

// copyOf is the name of the copy in that of a log, which may be an earlier one.
var copyOf = regexp.MustCompile(`^.+\.jsonl`)

// logOf is the name of the log that a file is of.
func logOf(path string) string {
	if m := logFile.FindStringSubmatch(filepath.Base(path)); m != nil {
		return m[1]
	}
	return filepath.Base(path)
}

// due lists the copies of which something may have to be removed. One look at
// the directory serves all of them.
func (r *received) due(now time.Time) (out []string, err error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, err
	}
	type sizes struct {
		bytes, last    int64     // of all files, and of the one that is written
		oldest, newest time.Time // of the files put aside
	}
	logs := map[string]*sizes{}
	var order []string
	for _, e := range entries {
		name, kept := strings.CutSuffix(e.Name(), ".kept.planned")
		m := logFile.FindStringSubmatch(name)
		info, err := e.Info()
		if m == nil || err != nil || !info.Mode().IsRegular() {
			continue // no log, or gone meanwhile
		}
		s := logs[m[1]]
		if s == nil {
			s = new(sizes)
			logs[m[1]] = s
			order = append(order, m[1])
		}
		switch at := info.ModTime(); {
		case kept:
			s.oldest = time.Unix(1, 0) // a removal was cut short
		case m[2] == "":
			s.bytes, s.last = s.bytes+info.Size(), info.Size()
		default:
			s.bytes += info.Size()
			if s.oldest.IsZero() || at.Before(s.oldest) {
				s.oldest = at
			}
			if at.After(s.newest) {
				s.newest = at
			}
		}
	}
	for _, name := range order {
		s := logs[name]
		old := !s.oldest.IsZero() && now.Sub(s.oldest) >= r.keep.Age
		idle := s.last > 0 && now.Sub(s.newest) >= r.keep.Part() && now.Sub(firstTime(filepath.Join(r.dir, name))) >= r.keep.Part()
		if r.keep.MaxBytes > 0 && s.bytes > r.keep.MaxBytes || r.keep.Age > 0 && (old || idle) {
			out = append(out, name)
		}
	}
	return out, nil
}

// firstTime is the time of the first record in a file, or when that was written
// if its time is yet to come; of one that has none, or cannot be read, it is long
// ago, and who opens it says why.
func firstTime(name string) time.Time {
	f, err := os.Open(name)
	if err != nil {
		return time.Time{}
	}
	defer f.Close()
	line, _ := bufio.NewReader(f).ReadBytes('\n')
	r, _, _ := audit.ParseLine(line)
	if st, err := f.Stat(); err == nil && r.Time.After(time.Now()) {
		return st.ModTime()
	}
	return r.Time
}
