package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
)

// A Filter picks records. Empty fields pick all. A text that ends in '*' picks
// what begins with the rest.
type Filter struct {
	Kind, ID, Decision, Reason, Rule, Src, Dst, Verb, Path, Trace string
	// Since and Until bound the time; Until is not included.
	Since, Until time.Time
}

// Match reports whether the filter picks a record.
func (f *Filter) Match(r *Record) bool {
	for _, t := range [...][2]string{
		{f.Kind, string(r.Kind)}, {f.Decision, r.Decision}, {f.Reason, r.Reason}, {f.Rule, r.Rule},
		{f.Src, r.Src}, {f.Dst, r.Dst}, {f.Verb, r.Verb}, {f.Path, r.Path}, {f.Trace, r.Trace},
	} {
		begin, open := strings.CutSuffix(t[0], "*")
		if t[0] != "" && t[0] != t[1] && (!open || !strings.HasPrefix(t[1], begin)) {
			return false
		}
	}
	if f.ID != "" && f.ID != r.ID && !sameCell(f.ID, r.ID) && !r.refuses(f.ID) {
		return false
	}
	return (f.Since.IsZero() || !r.Time.Before(f.Since)) && (f.Until.IsZero() || r.Time.Before(f.Until))
}

// sameCell says that two ids name the same count: a restart changes what stands
// before it, and the caller was told what stood there then.
func sameCell(a, b string) bool {
	i, gen, ok := cellOf(a)
	j, other, too := cellOf(b)
	return ok && too && i == j && gen == other
}

// RefusalOf reads the id of something that was refused since its record could not
// be kept: which run of the program refused it, and its number in the log. Only
// the gap record that counts it tells of it.
func RefusalOf(id string) (run string, n uint64, ok bool) {
	run, num, ok := strings.Cut(id, refusalMark)
	if !ok || run == "" {
		return "", 0, false
	}
	n, err := strconv.ParseUint(num, 16, 64)
	return run, n, err == nil && n > 0
}

// Refuses says if the record counts the refusal with a number.
func (r *Record) Refuses(n uint64) bool {
	return r.Kind == KindGap && r.Reason == reasonRefused && n <= r.Total && n > r.Total-min(r.Count, r.Total)
}

func (r *Record) refuses(id string) bool {
	_, n, ok := RefusalOf(id)
	return ok && r.Refuses(n)
}

// ErrStop ends Each without an error.
var ErrStop = errors.New("stop")

// Each calls fn with each line of the log at path and its record, oldest first,
// as far as the log is written now. The line is valid during the call.
func Each(path string, fn func(line []byte, r *Record) error) error {
	names, err := Segments(path)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := eachOf(name, fn)
		if errors.Is(err, fs.ErrNotExist) {
			if gone, e := kept(path); e == nil && gone.covers(path, name) {
				continue // removed since it was listed
			}
		}
		switch {
		case errors.Is(err, ErrStop):
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func eachOf(name string, fn func([]byte, *Record) error) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	br := bufio.NewReaderSize(f, maxLine+1)
	for n := 1; ; n++ {
		b, err := br.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return nil // a line that is being written is no record yet
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		r, _, err := ParseLine(b)
		if err != nil {
			return fmt.Errorf("line %d: %w; run audit verify", n, err)
		}
		if err := fn(b, &r); err != nil {
			return err
		}
	}
}

// LastSeq is the number of the newest record in the log at path, 0 when there is
// none.
func LastSeq(path string) (uint64, error) {
	names, err := Segments(path)
	if err != nil {
		return 0, err
	}
	for i := len(names) - 1; i >= 0; i-- {
		f, err := os.Open(names[i])
		if err != nil {
			return 0, err
		}
		st, err := f.Stat()
		var last lineEnd
		if err == nil {
			last, err = lastRecord(f, st.Size())
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return 0, fmt.Errorf("%s: %w", names[i], err)
		}
		if last.seq > 0 {
			return last.seq, nil
		}
	}
	gone, err := kept(path)
	return gone.last(), err
}
