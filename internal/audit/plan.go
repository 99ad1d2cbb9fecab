package audit

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An aside is a file that was put aside.
type aside struct {
	name        string
	first, last uint64
	size        int64
}

// plan says which files go, and by which rule; none when nothing does. What is
// being written stays, but is put aside when it has grown old: a log that is
// hardly written shall age, too.
func (k *Keeper) plan() (files []aside, rule string, err error) {
	if err := k.putAside(); err != nil {
		return nil, "", err
	}
	files, all, err := k.log.asides()
	if err != nil {
		return nil, "", err
	}
	n := 0
	for k.cfg.MaxBytes > 0 && all > k.cfg.MaxBytes && n < len(files) {
		all -= files[n].size
		n++
	}
	if n > 0 {
		rule = fmt.Sprintf("%smax_bytes %d", ruleOf, k.cfg.MaxBytes)
	}
	for k.cfg.Age > 0 && n < len(files) {
		at, err := newest(files[n].name)
		if err != nil {
			return nil, "", err
		}
		if time.Since(at) < k.cfg.Age {
			break
		}
		rule = fmt.Sprintf("%sage %v", ruleOf, k.cfg.Age)
		n++
	}
	if n == 0 {
		k.held = ""
		return nil, "", nil
	}
	free, why, err := k.free()
	if err != nil {
		return nil, "", err
	}
	may := slices.IndexFunc(files, func(a aside) bool { return a.last > free })
	if may < 0 {
		may = len(files)
	}
	held := ""
	if may < n {
		held = why
		if held != k.held {
			k.log.cfg.Log.Warn("audit records are kept beyond the rule", "path", k.log.cfg.Path, "rule", rule, "from", files[may].first, "why", why)
		}
	}
	k.held = held
	return files[:min(n, may, mostGone)], rule, nil
}

// putAside puts the file aside that is being written when its first record has
// a part of the age.
func (k *Keeper) putAside() error {
	l := k.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.cfg.Age == 0 || l.first == 0 || l.usable() != nil {
		return nil
	}
	line, err := firstLine(l.cfg.Path)
	if err != nil {
		return err
	}
	r, _, err := ParseLine(line)
	if err != nil {
		return err
	}
	st, err := os.Stat(l.cfg.Path)
	if err != nil {
		return err
	}
	// Of a file that is being written the time of the first record counts.
	if at := r.Time; time.Since(at) < k.cfg.Part() && (!at.After(time.Now()) || time.Since(st.ModTime()) < k.cfg.Part()) {
		return nil
	}
	return l.putAside()
}

// asides lists the files put aside, and how many bytes there are in all files.
func (l *Log) asides() (files []aside, all int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	names, err := Segments(l.cfg.Path)
	if err != nil {
		return nil, 0, err
	}
	for _, name := range names {
		st, err := os.Stat(name)
		if err != nil {
			return nil, 0, err
		}
		all += st.Size()
		if name == l.cfg.Path {
			continue
		}
		first, err := strconv.ParseUint(strings.TrimPrefix(name, l.cfg.Path+"."), 10, 64)
		if err != nil {
			return nil, 0, err
		}
		files = append(files, aside{name: name, first: first, size: st.Size()})
	}
	next := l.seq + 1
	if l.first > 0 {
		next = l.first
	}
	for i := len(files) - 1; i >= 0; i-- {
		files[i].last, next = next-1, files[i].first
	}
	return files, all, nil
}

// newest is when the last record came into a file: not before its time, and not
// before the file was written, since the times in a copy are another's to choose.
// A time that is yet to come says nothing: the file would never grow old.
func newest(name string) (time.Time, error) {
	f, err := os.Open(name)
	if err != nil {
		return time.Time{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return time.Time{}, err
	}
	last, err := lastRecord(f, st.Size())
	return agedFrom(last.at, st), err
}

// agedFrom is from when on something of a time in a file grows old.
func agedFrom(at time.Time, in os.FileInfo) time.Time {
	if m := in.ModTime(); m.After(at) || at.After(time.Now()) {
		return m
	}
	return at
}
