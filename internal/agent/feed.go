package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

// use puts a snapshot in force.
func (a *Agent) use(s *mesh.Snapshot) error {
	if err := a.cfg.Use(s); err != nil {
		return err
	}
	a.snapshot.Store(s)
	a.mu.Lock()
	close(a.fresh)
	a.fresh = make(chan struct{})
	a.mu.Unlock()
	a.cfg.Ready.Set(readyPolicy, nil)
	a.cfg.Metrics.PolicyRevision().Set(float64(s.PolicyRevision))
	return nil
}

// OnSnapshot is control.Handler. A disk that is full does not keep a new
// policy from being in force: it is said, and the next start waits for the
// issuer.
func (a *Agent) OnSnapshot(_ context.Context, s *mesh.Snapshot) error {
	if have := a.Snapshot(); have != nil && s.PolicyRevision < have.PolicyRevision {
		// Another issuer's memory is older, or somebody plays back the past.
		a.cfg.Metrics.PolicyRejected().Inc()
		return errors.New("the policy in force is newer: revision " + strconv.FormatUint(have.PolicyRevision, 10))
	}
	if err := a.use(s); err != nil {
		a.cfg.Metrics.PolicyRejected().Inc()
		a.cfg.Log.Error("policy rejected, the former stays in force", "revision", s.PolicyRevision, "err", err)
		return err
	}
	a.cfg.Log.Info("policy in force", "revision", s.PolicyRevision, "hash", s.PolicyHash)
	if err := daemon.WriteFile(a.file(snapshotFile), s.Encode(), 0o600); err != nil {
		a.cfg.Log.Error("policy not kept on disk", "err", err)
	}
	return nil
}

// OnSyncNow is control.Handler.
func (a *Agent) OnSyncNow(context.Context) { a.rot.Sync() }

// follow stays subscribed under the identity that is served, with the
// endpoints that its services have. Both may change; then it subscribes anew.
func (a *Agent) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		if a.held.WaitReady(ctx) != nil {
			return nil
		}
		self, err := a.Self()
		if err != nil {
			continue
		}
		eps := a.endpoints(self)
		sub, cancel := context.WithCancel(ctx)
		go func() {
			defer cancel()
			a.untilOther(sub, self, eps)
		}()
		err = a.client.Subscribe(sub, control.Hello{
			Kind: a.cfg.Kind, Workload: self.ID, Endpoints: eps, Have: a.Snapshot(), SVIDExpires: a.expires,
			Authorities: a.authorities, Changed: a.held.Changed,
		}, a)
		cancel()
		if err != nil {
			a.cfg.Log.Error("the issuer does not serve this node", "err", err)
			if !wait(ctx, retryMax) {
				return nil
			}
		}
	}
	return nil
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
	if s == nil || !a.cfg.Inbound.IsValid() {
		return nil
	}
	for _, svc := range s.Services {
		if svc.ID == self.ID {
			out = append(out, mesh.Endpoint{Service: svc.Name, Address: a.cfg.Inbound})
		}
	}
	return out
}

// untilOther returns when the identity or its endpoints are others.
func (a *Agent) untilOther(ctx context.Context, self svid.Identity, eps []mesh.Endpoint) {
	for {
		changed, news := a.held.Changed(), a.news()
		if now, err := a.Self(); err != nil || now.ID != self.ID || !slices.Equal(a.endpoints(self), eps) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-news:
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
// that a restart sends again at most one batch.
type lines struct {
	a    *Agent
	tail *audit.Tail
	at   uint64
}

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
	if l.tail != nil {
		l.tail.Close()
	}
	t, err := audit.OpenTail(l.a.cfg.Audit, after)
	l.tail, l.at = t, after
	return err
}

// Acked is control.AuditSource.
func (l *lines) Acked(seq uint64) error {
	return daemon.WriteFile(l.a.file(cursorFile), []byte(strconv.FormatUint(seq, 10)), 0o600)
}

// upload sends the audit log to the issuer, from where the last run left off.
func (a *Agent) upload(ctx context.Context) error {
	for ctx.Err() == nil {
		if a.held.WaitReady(ctx) != nil {
			return nil
		}
		self, err := a.Self()
		if err != nil {
			continue
		}
		var after uint64
		if b, err := os.ReadFile(a.file(cursorFile)); err == nil {
			after, _ = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		}
		src := &lines{a: a}
		err = a.client.UploadAudit(ctx, self.ID, after, src)
		if src.tail != nil {
			src.tail.Close()
		}
		if err != nil {
			a.cfg.Log.Error("audit upload stopped", "err", err)
			if !wait(ctx, retryMax) {
				return nil
			}
		}
	}
	return nil
}

// reportEvery is how often the edges are reported.
const reportEvery = 10 * time.Second

// reportEdges tells the issuer who called whom. What could not be told is
// added to the next report.
func (a *Agent) reportEdges(ctx context.Context) error {
	for wait(ctx, reportEvery) {
		got := a.cfg.Edges.Flush()
		if len(got) == 0 {
			continue
		}
		out := make([]mesh.Edge, len(got))
		for i, e := range got {
			out[i] = mesh.Edge(e)
		}
		if err := a.client.ReportEdges(ctx, out); err != nil {
			a.cfg.Edges.Restore(got)
			a.cfg.Log.Debug("edges not reported", "err", err)
		}
	}
	return nil
}
