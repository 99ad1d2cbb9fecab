package agent

import (
	"context"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/svid"
)

// use puts a snapshot in force.
func (a *Agent) use(s *mesh.Snapshot) error {
	if err := a.cfg.Use(s); err != nil {
		return err
	}
	a.snapshot.Store(s)
	a.cfg.Rejudge() // by what Snapshot says now
	a.mu.Lock()
	close(a.fresh)
	a.fresh = make(chan struct{})
	a.mu.Unlock()
	a.cfg.Ready.Set(readyPolicy, nil)
	a.cfg.Metrics.PolicyRevision().Set(float64(s.PolicyRevision))
	a.cfg.Metrics.Reloads("policy", "ok").Inc()
	return nil
}

// own refuses a snapshot of another trust domain.
func (a *Agent) own(s *mesh.Snapshot) error {
	if s.TrustDomain != a.cfg.TrustDomain {
		return fmt.Errorf("the policy is for trust domain %s, this proxy is in %s", s.TrustDomain, a.cfg.TrustDomain)
	}
	return nil
}

// OnSnapshot is control.Handler. A disk that is full does not keep a new
// policy from being in force: it is said, and the next start waits for the
// issuer. Only a signed set that cannot be kept is not taken: after a restart
// an older one would be.
func (a *Agent) OnSnapshot(_ context.Context, s *mesh.Snapshot) error {
	err := a.own(s)
	in := uint64(0)
	if have := a.Snapshot(); have != nil {
		in = have.PolicyRevision
	}
	if err == nil {
		// Nothing could follow on a revision that is far out.
		err = (&policyset.Set{Revision: s.PolicyRevision}).InReach(in)
	}
	if err == nil && s.PolicyRevision < in {
		// Another issuer's memory is older, or somebody plays back the past.
		err = errors.New("the policy in force is newer: revision " + strconv.FormatUint(in, 10))
	}
	switch {
	case err != nil:
	case a.pins == nil:
		err = a.use(s)
	default:
		s, err = a.usePinned(s)
	}
	if err != nil {
		return a.rejected(err)
	}
	a.cfg.Log.Info("policy in force", "revision", s.PolicyRevision, "hash", s.PolicyHash)
	if err := daemon.WriteFile(a.file(snapshotFile), s.Encode(), 0o600); err != nil {
		a.cfg.Log.Error("policy not kept on disk", "err", err)
	}
	return nil
}

// OnCandidate is control.Handler. A candidate is not kept on disk: the next
// start is told of it again.
func (a *Agent) OnCandidate(_ context.Context, rows *mesh.Snapshot) error {
	a.candidate.Store(nil)
	switch {
	case a.cfg.Try == nil:
		return nil
	case rows == nil:
		return a.cfg.Try(nil)
	}
	err := a.own(rows)
	if err == nil && a.pins != nil {
		rows, err = a.pins.candidate(rows)
	}
	if err != nil {
		return errors.Join(err, a.cfg.Try(nil))
	}
	if err := a.cfg.Try(rows); err != nil {
		a.cfg.Log.Error("candidate not tried, the policy in force is not touched", "revision", rows.PolicyRevision, "err", err)
		return err
	}
	a.candidate.Store(rows)
	return nil
}

// OnSyncNow is control.Handler.
func (a *Agent) OnSyncNow(context.Context) { a.rot.Sync() }

// follow stays subscribed under the identity that is served, with the
// endpoints that its services have. Both may change; then it subscribes anew.
func (a *Agent) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		if a.awaitIdentity(ctx) != nil {
			return nil //nolint:nilerr // the end that was asked for
		}
		self, err := a.Self()
		if err != nil {
			continue
		}
		eps := a.endpoints(self)
		sub, cancel := context.WithCancel(ctx)
		var watch sync.WaitGroup
		watch.Go(func() {
			defer cancel()
			a.untilOther(sub, self, eps)
		})
		err = a.client.Subscribe(sub, control.Hello{
			Kind: a.cfg.Kind, Version: daemon.Version(), Workload: self.ID, Endpoints: eps, Have: a.Snapshot(), HaveCandidate: a.candidate.Load(), SVIDExpires: a.expires,
			Authorities: a.authorities, Changed: a.held.Changed, OnState: a.onState, Vouch: a.voucher(self.ID), Steering: a.cfg.Steering, Show: a.cfg.Show,
		}, a)
		cancel()
		watch.Wait()
		if err != nil {
			a.noticed(err)
			a.cfg.Log.Error("the issuer does not serve this node", "err", err)
			if !wait(ctx, retryMax) {
				return nil
			}
		}
	}
	return nil
}

// onState is control.Hello's. An issuer that refuses the subscription may no
// longer know the entry: then the identity must go now, not at the next poll.
func (a *Agent) onState(err error) {
	if errors.Is(err, control.ErrRefused) {
		a.rot.Sync()
	}
}

// awaitIdentity waits for an SVID. While there is none every call is refused,
// so the issuer is asked more often than the rotator's patience alone would.
func (a *Agent) awaitIdentity(ctx context.Context) error {
	for {
		c, cancel := context.WithTimeout(ctx, retryMax/4+mrand.N(retryMax/4))
		err := a.held.WaitReady(c)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		a.rot.Sync()
	}
}

func (a *Agent) expires() time.Time {
	self, err := a.Self()
	if err != nil {
		return time.Time{}
	}
	return self.Expires()
}

// endpoints are those of the services that self serves, by the policy in force.
func (a *Agent) endpoints(self svid.Identity) (out []mesh.Endpoint) {
	s := a.Snapshot()
	if s == nil || !a.cfg.Inbound.IsValid() || a.unserved() != nil {
		return nil
	}
	for _, svc := range s.Services {
		if svc.ID == self.ID {
			out = append(out, mesh.Endpoint{Service: svc.Name, Address: a.cfg.Inbound, Labels: a.cfg.Labels})
		}
	}
	return out
}

// unserved is Serving while it is open, nil when nothing has to be waited for.
func (a *Agent) unserved() <-chan struct{} {
	select {
	case <-a.cfg.Serving:
		return nil
	default:
		return a.cfg.Serving
	}
}

// untilOther returns when the identity or its endpoints are others.
func (a *Agent) untilOther(ctx context.Context, self svid.Identity, eps []mesh.Endpoint) {
	for {
		changed, news, serving := a.held.Changed(), a.news(), a.unserved()
		if now, err := a.Self(); err != nil || now.ID != self.ID || !slices.Equal(a.endpoints(self), eps) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-news:
		case <-serving:
		}
	}
}

// news is closed when the next snapshot is in force.
func (a *Agent) news() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fresh
}

const (
	// uploadBatch bounds the lines of one batch.
	uploadBatch = 512
	// uploadGather is how long a batch waits for more than its first line.
	uploadGather = 5 * time.Millisecond
)

// lines is the audit log as the upload reads it. The cursor is on disk, so
// that a restart sends again what was acknowledged in the last ackEvery, and
// nothing is left out. The issuer passes over what it has.
type lines struct {
	a    *Agent
	tail *audit.Tail
	at   uint64
	// acked is the newest acknowledged line, kept the one on disk since when.
	acked, kept uint64
	when        time.Time
}

// ackEvery is how often the cursor is written: a write costs two fsyncs.
const ackEvery = time.Second

// Next is control.AuditSource: it waits for one line and takes what else is
// there.
func (l *lines) Next(ctx context.Context, after uint64) (out [][]byte, last uint64, err error) {
	if l.tail == nil || after != l.at {
		if err := l.seek(after); err != nil {
			return nil, 0, err
		}
	}
	c := ctx
	for len(out) < uploadBatch {
		line, seq, err := l.tail.Next(c)
		if err != nil {
			if len(out) > 0 && ctx.Err() == nil {
				break
			}
			l.at = 0 // the lines taken so far were not given: seek again
			return nil, 0, err
		}
		if out == nil {
			var cancel context.CancelFunc
			c, cancel = context.WithTimeout(ctx, uploadGather)
			defer cancel()
		}
		out, last = append(out, slices.Clone(line[:len(line)-1])), seq
	}
	l.at = last
	return out, last, nil
}

func (l *lines) seek(after uint64) error {
	l.close()
	t, err := audit.OpenTail(l.a.cfg.Audit, after)
	l.tail, l.at = t, after
	return err
}

func (l *lines) close() {
	if l.tail != nil {
		l.tail.Close()
		l.tail = nil
	}
}

// Acked is control.AuditSource.
func (l *lines) Acked(seq uint64) error {
	l.acked = seq
	if now := time.Now(); now.Sub(l.when) >= ackEvery {
		l.when = now
		return l.keep()
	}
	return nil
}

// keep writes the cursor.
func (l *lines) keep() error {
	if l.acked == l.kept {
		return nil
	}
	l.kept = l.acked
	if err := daemon.WriteFile(l.a.file(cursorFile), []byte(strconv.FormatUint(l.acked, 10)), 0o600); err != nil {
		return err
	}
	l.a.spool.Delivered(l.acked)
	return nil
}

// keptCursor is the last line that the issuer was known to have, 0 for none.
func (a *Agent) keptCursor() uint64 {
	b, err := os.ReadFile(a.file(cursorFile))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// cursor is the last line that the issuer is known to have. A log that does not
// hold that line is another one, of which the issuer has nothing.
func (a *Agent) cursor(ctx context.Context) uint64 {
	n := a.keptCursor()
	if n == 0 {
		return 0
	}
	src := lines{a: a}
	defer src.close()
	ctx, cancel := context.WithTimeout(ctx, a.cursorWait)
	defer cancel()
	if err := src.seek(n - 1); err == nil {
		if _, seq, err := src.tail.Next(ctx); err == nil && seq == n {
			return n
		}
	}
	a.cfg.Log.Warn("the audit log does not hold the line that was sent last; sending it from the beginning", "line", n)
	return 0
}

// cursorWait bounds the look for a line that should be there.
const cursorWait = time.Second

// upload sends the audit log to the issuer, from where the last run left off.
func (a *Agent) upload(ctx context.Context) error {
	for ctx.Err() == nil {
		if a.held.WaitReady(ctx) != nil {
			return nil //nolint:nilerr // the end that was asked for
		}
		self, err := a.Self()
		if err != nil {
			continue
		}
		src := &lines{a: a}
		from := a.cursor(ctx)
		a.spool.Delivered(from)
		err = a.client.UploadAudit(ctx, self.ID, from, src)
		src.close()
		if err := src.keep(); err != nil {
			a.cfg.Log.Error("audit cursor not kept", "err", err)
		}
		if err != nil {
			a.noticed(err)
			a.cfg.Log.Error("audit upload stopped", "err", err)
			if !wait(ctx, retryMax) {
				return nil
			}
		}
	}
	return nil
}

// samplesEvery is how often the issuer is told of the calls of rollouts: a canary
// that does badly goes back soon after.
const samplesEvery = time.Second

// reportSamples tells the issuer of the calls of rollouts. What it may have heard
// is not told again, nor what was counted while it was away: a verdict is by the
// calls of one stretch of time, and both sides miss the same.
func (a *Agent) reportSamples(ctx context.Context) error {
	for wait(ctx, samplesEvery) {
		list := a.cfg.Samples()
		self, err := a.Self()
		if len(list) == 0 || err != nil {
			continue
		}
		if err := a.tellSamples(ctx, self.ID, list); err != nil && ctx.Err() == nil {
			a.noticed(err)
			a.cfg.Log.Warn("calls of a rollout not reported", "err", err)
		}
	}
	return nil
}

func (a *Agent) tellSamples(ctx context.Context, workload spiffeid.ID, list []mesh.Sample) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	return a.client.ReportSamples(ctx, workload, list)
}

// reportTimeout bounds one report.
const reportTimeout = 2 * time.Second

// reportEdges tells the issuer who called whom, and once more at the end.
func (a *Agent) reportEdges(ctx context.Context) error {
	for wait(ctx, a.cfg.reportEvery) {
		a.tellEdges(ctx)
	}
	a.tellEdges(ctx)
	return nil
}

// tellEdges reports what was counted. What could not be told is added to the
// next report. The end of ctx breaks no report off: whether it has arrived
// would not be known, and it would count twice.
func (a *Agent) tellEdges(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reportTimeout)
	defer cancel()
	got := a.cfg.Edges.Flush()
	if len(got) == 0 {
		return
	}
	out := make([]mesh.Edge, len(got))
	for i, e := range got {
		out[i] = mesh.Edge{Src: e.Src, Dst: e.Dst, Proto: e.Proto, Allowed: e.Allowed, Denied: e.Denied, Errors: e.Errors, MTLS: e.MTLS, First: e.First, Last: e.Last, Took: e.Took}
	}
	err := a.client.ReportEdges(ctx, out)
	if errors.Is(err, control.ErrRefused) {
		a.cfg.Log.Warn("the issuer refuses to count calls", "edges", len(out), "err", err)
		return // it would refuse them each time, and with them all that come
	}
	if err != nil {
		a.noticed(err)
		a.cfg.Edges.Restore(got)
		a.cfg.Log.Debug("edges not reported", "err", err)
	}
}
