package sink

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// A cursor is how far a sink has come. Its file has the number of the record
// that was sent last, then a line each for what else is known.
type cursor struct {
	sent uint64
	// log names the log by the hash of its first record: it tells the log that
	// the cursor belongs to from another that was begun in its place.
	log string
	// begun is the last record of a batch that may have been delivered, 0 when
	// none was begun.
	begun uint64
}

func parseCursor(b []byte) (c cursor, err error) {
	for i, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		key, v, _ := strings.Cut(line, " ")
		switch {
		case i == 0:
			c.sent, err = strconv.ParseUint(line, 10, 64)
		case key == "log":
			c.log = v
		case key == "begun":
			c.begun, err = strconv.ParseUint(v, 10, 64)
		}
		if err != nil {
			return cursor{}, err
		}
	}
	return c, nil
}

func (c cursor) text() []byte {
	b := fmt.Appendf(nil, "%d\nlog %s\n", c.sent, c.log)
	if c.begun > 0 {
		b = fmt.Appendf(b, "begun %d\n", c.begun)
	}
	return b
}

// resume reads how far an earlier run has come.
func (s *Sink) resume() error {
	b, err := os.ReadFile(s.file())
	if err == nil {
		s.at, err = parseCursor(b)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("audit sink %s: cursor: %w; remove %s to send the log from its beginning", s.name, err, s.file())
	}
	s.passed()
	return nil
}

// know compares the cursor with the log, once that has a record. Of another log
// nothing was sent yet.
func (s *Sink) know() error {
	begin, first, known, err := audit.Begin(s.env.Path)
	if err != nil {
		return err
	}
	id := hex.EncodeToString(begin[:8])
	last, err := audit.LastSeq(s.env.Path)
	if err != nil {
		return err
	}
	was := s.at
	switch {
	case known && was.log != "" && was.log != id:
		s.env.Log.Warn("the audit log is another than the one that was sent; sending it from its beginning", "sink", s.name, "sent", was.sent)
		s.at = cursor{log: id}
	case last < was.sent:
		s.env.Log.Warn("the audit log is shorter than what was sent of it; sending it from its beginning", "sink", s.name, "sent", was.sent, "records", last)
		s.at = cursor{log: id}
	case last < was.begun:
		s.at.begun = 0
	}
	if s.at.log == "" {
		s.at.log = id
	}
	if gone := first - 1; s.at.sent < gone {
		if err := s.skip(gone); err != nil {
			return err
		}
	}
	s.passed()
	s.known = true
	return nil
}

// skip goes on behind records that were removed from the log. For a sink that is
// new they were never meant; what another had still to get is a loss, and said.
func (s *Sink) skip(gone uint64) error {
	if s.at.sent > 0 {
		n := gone - s.at.sent
		r := audit.Record{
			Kind: audit.KindGap, Reason: reasonLost, Count: n, Full: true, Done: true,
			Detail: fmt.Sprintf("records %d to %d were removed from the log before sink %s had them", s.at.sent+1, gone, s.name),
		}
		if err := s.env.Append(&r); err != nil {
			return err
		}
		s.env.Metrics.AuditSink(s.name, "lost").Add(int64(n))
		s.env.Log.Error("audit records were removed before a sink had them", "sink", s.name, "first", s.at.sent+1, "last", gone)
	}
	s.at.sent, s.at.begun = gone, 0
	return s.save()
}

// passed notes what the cursor on the disk has passed.
func (s *Sink) passed() {
	s.durable.Store(s.at.sent)
	s.reader.Delivered(s.at.sent)
}

func (s *Sink) file() string { return s.env.Path + ".sink-" + s.name }

// save brings the cursor to the disk.
func (s *Sink) save() error {
	if err := daemon.WriteFile(s.file(), s.at.text(), 0o600); err != nil {
		return fmt.Errorf("cursor: %w", err)
	}
	s.passed()
	return nil
}

// mostRefused bounds the file of refused records. Beyond it the sink waits for
// somebody to look: it lets nothing go that is not kept.
const mostRefused = 64 << 20

// setAside keeps records that the peer does not take, each with the reason, and
// counts them.
func (s *Sink) setAside(b *batch, why error, n int) error {
	path := s.file() + ".refused"
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	var out bytes.Buffer
	for _, r := range b.records {
		fmt.Fprintf(&out, `{"reason":%s,"record":%s}`+"\n", quote(why.Error()), bytes.TrimSuffix(r.native, []byte("\n")))
	}
	if st.Size()+int64(out.Len()) > mostRefused {
		return fmt.Errorf("%w; %s is full: see why, and move it away", why, path)
	}
	if _, err := f.Write(out.Bytes()); err != nil {
		return errors.Join(err, f.Truncate(st.Size()))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	s.env.Metrics.AuditSink(s.name, "refused").Add(int64(n))
	s.env.Log.Error("audit records refused by the sink and set aside", "sink", s.name, "first", b.first(), "last", b.last(), "refused", n, "err", why, "file", path)
	// A refusal of the record that tells of one tells nothing new: it would
	// make the next.
	if len(b.records) > 1 || b.records[0].Reason != reasonRefused {
		s.untold, s.why = s.untold+uint64(n), fmt.Sprintf("sink %s did not take records, the last in %d to %d: %v", s.name, b.first(), b.last(), why)
	}
	return nil
}
