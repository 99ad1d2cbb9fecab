package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

const (
	// searchMost bounds what one question reads, newest files first, and
	// searchTime how long it may take: an operator waits.
	searchMost = 2 << 30
	searchTime = 20 * time.Second
)

// why explains a decision of a proxy from its copy of the log, by the policy in
// force. It is control.ServerConfig's.
func (in *issuer) why(ctx context.Context, id string) ([]byte, error) {
	r, log, err := in.received.find(ctx, id)
	if err != nil {
		return nil, err
	}
	var set *authz.Set
	if snap := in.registry.Current(); snap != nil {
		if set, err = authz.Compile(snap); err != nil {
			return nil, err
		}
	}
	told := set.Recorded(&r)
	if r.Kind == audit.KindGap {
		told = authz.Unrecordable(id, &r)
	}
	told.Log = log
	return json.Marshal(told)
}

// find returns the record of a decision and the name of the log that has it.
func (r *received) find(ctx context.Context, id string) (rec audit.Record, log string, err error) {
	select { // one at a time: each reads what the disk gives
	case r.searching <- struct{}{}:
		defer func() { <-r.searching }()
	case <-ctx.Done():
		return rec, "", ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, searchTime)
	defer cancel()
	files, err := r.files()
	if err != nil {
		return rec, "", fmt.Errorf("search received audit records: %w", err)
	}
	s := search{filter: audit.Filter{ID: id}, left: searchMost, ran: map[string]bool{}, gaps: map[string]audit.Record{}}
	// The id of a count: a restart changes what stands before the "-".
	s.needle = []byte(id[strings.LastIndexByte(id, '-')+1:] + `"`)
	s.run, s.number, s.refusal = audit.RefusalOf(id)
	for _, f := range files {
		if err := s.file(ctx, f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return rec, "", fmt.Errorf("search received audit records: %w", err)
		}
		if s.found.Kind == audit.KindDecision || s.found.Kind == audit.KindGap {
			break
		}
	}
	s.sameLog()
	switch {
	case s.found.Kind != "":
		return s.found, s.log, nil
	case s.left <= 0 || ctx.Err() != nil:
		return rec, "", fmt.Errorf("%w: decision %s is not among the newest %d MiB of the logs that this issuer received; ask the proxy (sallyport why %s --proxy SOCKET) or search its log (sallyport audit query --id %s FILE)",
			mesh.ErrNotFound, id, (searchMost-max(s.left, 0))>>20, id, id)
	}
	return rec, "", fmt.Errorf("%w: no log that this issuer received has decision %s; proxies send their records within seconds, and to one issuer each: ask again, ask another issuer, or ask the proxy (sallyport why %s --proxy SOCKET)",
		mesh.ErrNotFound, id, id)
}

// files are the received logs, the one that was written last first. Lines that
// do not continue a log are no evidence and left out.
func (r *received) files() ([]string, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, err
	}
	type file struct {
		name string
		at   time.Time
	}
	var all []file
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || !logFile.MatchString(e.Name()) {
			continue // gone meanwhile, or no log
		}
		all = append(all, file{filepath.Join(r.dir, e.Name()), info.ModTime()})
	}
	slices.SortFunc(all, func(a, b file) int { return cmp.Or(b.at.Compare(a.at), cmp.Compare(a.name, b.name)) })
	names := make([]string, len(all))
	for i, f := range all {
		names[i] = f.name
	}
	return names, nil
}

// A search looks for the record of a decision: a record of its own, or else the
// newest roll-up of its count.
type search struct {
	filter audit.Filter
	needle []byte
	left   int64 // bytes that may still be read

	found audit.Record
	log   string

	// Of a refusal: which run of a proxy made it, and its number in the log.
	refusal bool
	run     string
	number  uint64
	// ran has the logs in which that run wrote, gaps the records that count the
	// number and were written by another.
	ran  map[string]bool
	gaps map[string]audit.Record
}

// gap looks at a line for a refusal.
func (s *search) gap(b []byte, log string) {
	if !s.ran[log] && bytes.Contains(b, []byte(`"id":"`+s.run+"-")) {
		s.ran[log] = true
	}
	if !bytes.Contains(b, []byte(`"kind":"gap"`)) {
		return
	}
	rec, _, err := audit.ParseLine(b)
	switch {
	case err != nil || !rec.Refuses(s.number):
	case strings.HasPrefix(rec.ID, s.run+"-"):
		s.found, s.log = rec, log
	default:
		s.gaps[log] = rec
	}
}

// sameLog takes the gap record that a later run wrote, of the log in which the
// run that refused has written, too: numbers go on over a restart.
func (s *search) sameLog() {
	for log, rec := range s.gaps {
		if s.found.Kind == "" && s.ran[log] {
			s.found, s.log = rec, log
		}
	}
}

func (s *search) file(ctx context.Context, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	br := bufio.NewReaderSize(f, 1<<20)
	long := false // within a line that is longer than any record
	for s.left > 0 && ctx.Err() == nil {
		b, err := br.ReadSlice('\n')
		s.left -= int64(len(b))
		switch {
		case errors.Is(err, io.EOF):
			return nil // what is being written is no record yet
		case errors.Is(err, bufio.ErrBufferFull):
			long = true
			continue
		case err != nil:
			return err
		case s.refusal && !long:
			if s.gap(b, logOf(name)); s.found.Kind != "" {
				return nil
			}
			continue
		case long || !bytes.Contains(b, s.needle):
			long = false
			continue
		}
		rec, _, err := audit.ParseLine(b)
		if err != nil || !s.filter.Match(&rec) {
			continue
		}
		switch {
		case rec.Kind == audit.KindDecision:
			s.found, s.log = rec, filepath.Base(name)
			return nil
		case rec.Kind == audit.KindRollup && rec.Detail == "" && (s.found.Kind == "" || rec.Time.After(s.found.Time)):
			s.found, s.log = rec, filepath.Base(name)
		}
	}
	return nil
}
