package sink

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// The times of a sink.
const (
	deliverTime = 30 * time.Second
	retryMin    = 100 * time.Millisecond
	retryMax    = 30 * time.Second
	// tellEvery is how often refused records make a record: a peer that refuses
	// everything must not fill the log.
	tellEvery = time.Minute
)

// The reasons of records that tell of what a sink did not get.
const (
	reasonRefused = "sink_refused"
	reasonLost    = "sink_lost"
)

// A refusal is an answer that says that the batch will never be taken.
type refusal struct {
	err error
	// large is set when the batch has too many bytes.
	large bool
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// A partial is an answer that took a batch but for some records, without saying
// which.
type partial struct {
	refused int
	err     error
}

func (p *partial) Error() string { return p.err.Error() }
func (p *partial) Unwrap() error { return p.err }

// A busy answer says when to come again.
type busy struct {
	err   error
	after time.Duration
}

func (b *busy) Error() string { return b.err.Error() }
func (b *busy) Unwrap() error { return b.err }

// A Sink sends one log to one system.
type Sink struct {
	cfg    Config
	name   string
	env    Env
	kind   kind
	limits BatchConfig
	peer   peer

	// reader tells the spool what the cursor on the disk has passed.
	reader *audit.Reader

	tail *audit.Tail
	held *record
	// at is how far the sink has come, known whether it was compared with the
	// log.
	at    cursor
	known bool
	// queue is what was read and not yet delivered.
	queue []*batch
	// untold counts refused records that no record tells of yet, why is the
	// last reason.
	untold uint64
	why    string
	told   time.Time

	// durable is the cursor on the disk. oldest is when the oldest record that
	// was read and not delivered was made, in Unix nanoseconds, 0 when there is
	// none.
	durable atomic.Uint64
	oldest  atomic.Int64

	// retryMin and retryMax are the bounds of the wait after a failure.
	retryMin, retryMax time.Duration
}

// New prepares one sink. It contacts nobody.
func New(cfg Config, env Env) (*Sink, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("audit sink: %w", err)
	}
	k := cfg.kinds()[0]
	s := &Sink{cfg: cfg, name: cfg.Name, env: env, kind: k, limits: cfg.Batch.or(k.batch), retryMin: retryMin, retryMax: retryMax}
	if err := s.resume(); err != nil {
		return nil, err
	}
	var err error
	if s.peer, err = k.cfg.open(env, cfg.Name); err != nil {
		return nil, fmt.Errorf("audit sink %s: %s: %w", cfg.Name, k.name, err)
	}
	env.Metrics.AuditSinkLag(s.name, s.lag)
	return s, nil
}

// Name of the sink.
func (s *Sink) Name() string { return s.name }

// Sent is the newest record that was delivered, as far as the disk knows: after
// a crash delivery goes on behind it.
func (s *Sink) Sent() uint64 { return s.durable.Load() }

// lag is how many records wait, and for how long the oldest has.
func (s *Sink) lag() (records, seconds float64) {
	if n, sent := s.env.Durable(), s.Sent(); n > sent {
		records = float64(n - sent)
	}
	if at := s.oldest.Load(); at > 0 {
		seconds = max(0, time.Since(time.Unix(0, at)).Seconds())
	}
	return records, seconds
}

// Run sends records until ctx ends.
func (s *Sink) Run(ctx context.Context) error {
	pause, failed, said := s.retryMin, false, ""
	for ctx.Err() == nil {
		err := s.round(ctx)
		s.tell()
		switch {
		case ctx.Err() != nil:
		case err != nil:
			s.env.Metrics.AuditSinkError(s.name).Inc()
			// Once, and again when the reason is another.
			if text := err.Error(); text != said {
				said = text
				s.env.Log.Error("audit records not delivered; they are kept, and it is tried again", "sink", s.name, "err", err)
			}
			failed = true
			s.close()
			daemon.Pause(ctx, s.wait(pause, err))
			pause = min(2*pause, s.retryMax)
		case failed:
			s.env.Log.Info("audit records are delivered again", "sink", s.name, "record", s.at.sent)
			failed, pause, said = false, s.retryMin, ""
		}
	}
	s.close()
	return nil
}

// wait is the pause before the next attempt. A fleet whose collector comes back
// does not come to it at one moment.
func (s *Sink) wait(pause time.Duration, err error) time.Duration {
	pause = pause/2 + rand.N(pause)
	if b := (*busy)(nil); errors.As(err, &b) {
		pause = max(pause, min(b.after, 10*s.retryMax))
	}
	return pause
}

// close gives up what a failure may have spoiled. What was read stays.
func (s *Sink) close() {
	s.peer.close()
	if s.tail != nil && len(s.queue) == 0 {
		s.tail.Close()
		s.tail, s.known = nil, false
	}
}

// round delivers one batch and moves the cursor.
func (s *Sink) round(ctx context.Context) error {
	if s.durable.Load() != s.at.sent {
		if err := s.save(); err != nil {
			return err
		}
	}
	if len(s.queue) == 0 {
		b, err := s.gather(ctx)
		if err != nil {
			return err
		}
		if err := s.awaitDisk(ctx, b.last()); err != nil {
			return err
		}
		s.queue = append(s.queue, b)
	}
	b := s.queue[0]
	if s.kind.fixed && s.at.begun == 0 {
		s.at.begun = b.last()
		if err := s.save(); err != nil {
			s.at.begun = 0
			return err
		}
	}
	err := s.deliver(ctx, b)
	var no *refusal
	var some *partial
	switch {
	case errors.As(err, &no) && len(b.records) > 1:
		if no.large {
			s.limits.Bytes = max(b.bytes/2, 1024)
		}
		s.queue = append(b.halves(), s.queue[1:]...)
		s.env.Metrics.AuditSinkError(s.name).Inc()
		return nil
	case errors.As(err, &no):
		err = s.setAside(b, no, 1)
	case errors.As(err, &some):
		err = s.setAside(b, some, some.refused)
	case err == nil:
		s.env.Metrics.AuditSink(s.name, "sent").Add(int64(len(b.records)))
	}
	if err != nil {
		return err
	}
	s.queue = s.queue[1:]
	s.at.sent, s.at.begun = b.last(), 0
	s.oldest.Store(0)
	if len(s.queue) > 0 {
		s.oldest.Store(s.queue[0].records[0].Time.UnixNano())
	}
	return s.save()
}

func (s *Sink) deliver(ctx context.Context, b *batch) error {
	ctx, cancel := context.WithTimeout(ctx, deliverTime)
	defer cancel()
	return s.peer.deliver(ctx, b)
}

// tell writes a record of what was refused since the last.
func (s *Sink) tell() {
	if s.untold == 0 || time.Since(s.told) < tellEvery {
		return
	}
	r := audit.Record{Kind: audit.KindError, Reason: reasonRefused, Count: s.untold, Detail: s.why, Full: true, Done: true}
	if err := s.env.Append(&r); err != nil {
		return // it is told with the next; the metric has it
	}
	s.untold, s.told = 0, time.Now()
}
