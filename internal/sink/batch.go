package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"sallyport/internal/audit"
)

// A batch is what is handed over at once: records of one log, without a hole.
type batch struct {
	// log names the log; it stays the same over restarts.
	log     string
	records []record
	bytes   int
}

// A record is a line of the log.
type record struct {
	audit.Record
	// native is the line of the log, text what the peer gets; both end in a line
	// feed.
	native, text []byte
}

func (b *batch) first() uint64 { return b.records[0].Seq }
func (b *batch) last() uint64  { return b.records[len(b.records)-1].Seq }

// lines is the whole batch, a record a line.
func (b *batch) lines() []byte {
	out := make([]byte, 0, b.bytes)
	for _, r := range b.records {
		out = append(out, r.text...)
	}
	return out
}

func (b *batch) add(r record) {
	b.records = append(b.records, r)
	b.bytes += len(r.text)
}

// halves divides a batch of several records.
func (b *batch) halves() []*batch {
	out := []*batch{{log: b.log}, {log: b.log}}
	for i, r := range b.records {
		out[2*i/len(b.records)].add(r)
	}
	return out
}

// gather waits for a record and takes what else comes before the batch is full
// or has waited. A batch that was begun before ends where it did.
func (s *Sink) gather(ctx context.Context) (*batch, error) {
	if !s.known {
		if err := s.awaitLog(ctx); err != nil {
			return nil, err
		}
	}
	if s.tail == nil {
		t, err := audit.OpenTail(s.env.Path, s.at.sent)
		if err != nil {
			return nil, err
		}
		s.tail, s.held = t, nil
	}
	b := &batch{log: s.at.log}
	r, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	b.add(*r)
	s.oldest.Store(r.Time.UnixNano())
	soon, cancel := context.WithTimeout(ctx, s.limits.Wait)
	defer cancel()
	if s.at.begun > 0 {
		soon = ctx
	}
	for s.at.begun > 0 && b.last() < s.at.begun || s.at.begun == 0 && len(b.records) < s.limits.Records && b.bytes < s.limits.Bytes {
		r, err := s.read(soon)
		if err != nil && soon.Err() != nil && ctx.Err() == nil {
			break
		}
		if err != nil {
			return nil, err
		}
		if s.at.begun == 0 && b.bytes+len(r.text) > s.limits.Bytes {
			s.held = r
			break
		}
		b.add(*r)
	}
	return b, nil
}

// read returns the next record in the format of the sink, once it is on the
// disk.
func (s *Sink) read(ctx context.Context) (*record, error) {
	if r := s.held; r != nil {
		s.held = nil
		return r, nil
	}
	line, seq, err := s.tail.Next(ctx)
	if err != nil {
		return nil, err
	}
	r := &record{native: bytes.Clone(line)}
	r.text = r.native
	if r.Record, _, err = audit.ParseLine(r.native); err != nil {
		return nil, fmt.Errorf("record %d: %w", seq, err)
	}
	if s.cfg.Format == "ocsf" {
		if r.text, err = audit.OCSF(&r.Record); err != nil {
			return nil, fmt.Errorf("record %d: %w", seq, err)
		}
	}
	return r, nil
}

// awaitLog waits until the log has a record.
func (s *Sink) awaitLog(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for s.env.Durable() == 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return s.know()
}

// awaitDisk waits until a crash cannot take back what is about to be sent: the
// numbers would come again with other records.
func (s *Sink) awaitDisk(ctx context.Context, last uint64) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for s.env.Durable() < last {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

// lookEvery is how often a sink looks for what it waits for on the disk: half of
// the time in which the log brings a record there.
const lookEvery = 5 * time.Millisecond

// quote is a text in JSON. Marshal of a string cannot fail.
func quote(s string) []byte {
	b, _ := json.Marshal(s)
	return b
}
