package control

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

const (
	maxEndpoints = 256
	// maxReason bounds the words of a nack, bytes.
	maxReason = 1024
)

// meshAPI is sallyport.mesh.v1.Mesh.
type meshAPI struct {
	meshpb.UnimplementedMeshServer
	s *Server
}

// entitled reports whether agent has an entry for workload.
func (s *Server) entitled(agent, workload spiffeid.ID) bool {
	return slices.ContainsFunc(s.cfg.Registry.EntriesFor(agent), func(e mesh.Entry) bool { return e.SPIFFEID == workload })
}

// speaksFor reports whether a proxy of the agent may be of a kind. A gateway's
// view is that of the whole way out, so its entry must be that of a proxy that
// is its own workload: self:true. Otherwise any sidecar's node could ask for it.
func (s *Server) speaksFor(agent, workload spiffeid.ID, kind string) error {
	return s.mayBe(s.cfg.Registry.EntriesFor(agent), agent, workload, kind)
}

// mayBe is speaksFor by the entries that the agent has.
func (s *Server) mayBe(entries []mesh.Entry, agent, workload spiffeid.ID, kind string) error {
	itself, entitled := false, false
	for i := range entries {
		if e := &entries[i]; e.SPIFFEID == workload {
			entitled = true
			itself = itself || slices.Contains(e.Selectors, mesh.Selector{Type: "self", Value: "true"})
		}
	}
	if !entitled {
		return s.errNotEntitled(agent, workload)
	}
	if kind == KindGateway && !itself {
		return refuse(codes.PermissionDenied, "the entry of %s for %s is not a gateway's: its selectors must hold self:true", agent, workload)
	}
	return nil
}

func (s *Server) errNotEntitled(agent, workload spiffeid.ID) error {
	return refuse(codes.PermissionDenied, "agent %s has no entry for %s: add one to entries.yaml with this agent, or an alias of it, as its parent", agent, workload)
}

// A subscriber is one proxy. It may for a moment have two streams.
type subscriber struct {
	agent, workload spiffeid.ID
	kind            string
}

// A subscription is one stream of a subscriber.
type subscription struct {
	s         *Server
	st        grpc.BidiStreamingServer[meshpb.SubscribeRequest, meshpb.SubscribeResponse]
	who       caller
	key       subscriber
	endpoints []mesh.Endpoint
	// announced marks the endpoints announced since the last refresh.
	announced []bool
	// sent is the last snapshot or sameness told; hash and candidate are what the proxy has
	// or were sent last.
	sentRevision, sentPolicy uint64
	hash, candidate          string
	limits                   map[mesh.Quota]uint32 // in what was sent last
	// revoked is the revision of the revocations told last.
	revoked uint64
	// told says that the proxy was told to fetch the identities of entries, and
	// what trust hashes; forced counts the calls of SyncNow that were passed on.
	told    bool
	entries []mesh.Entry
	trust   [sha256.Size]byte
	forced  uint64
	proxy   mesh.Proxy
	// stopsTold is the revision of the stops of faults told last, if any were.
	stopsTold uint64
	toldStops bool
	// looks are what operators ask the proxy to show; nil when it does not know of
	// that. version is the proxy's, for them.
	looks   chan *meshpb.Look
	version string
}

// Subscribe pushes snapshots to one proxy until either end leaves.
func (a *meshAPI) Subscribe(st grpc.BidiStreamingServer[meshpb.SubscribeRequest, meshpb.SubscribeResponse]) error {
	who, err := callerOf(st.Context())
	if err != nil {
		return err
	}
	req, err := firstMessage(st, a.s.hello)
	if err != nil {
		return err
	}
	sub, err := a.s.subscribe(st, who, req.GetHello())
	if err != nil {
		return err
	}
	defer sub.close()
	// The header tells the proxy that its hello was accepted.
	if err := st.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	return sub.run(st.Context())
}

// subscribe checks a hello.
func (s *Server) subscribe(st grpc.BidiStreamingServer[meshpb.SubscribeRequest, meshpb.SubscribeResponse], who caller, h *meshpb.Hello) (*subscription, error) {
	if h == nil {
		return nil, refuse(codes.InvalidArgument, "the first message of a subscription is the hello")
	}
	if err := checkKind(h.GetKind()); err != nil {
		return nil, err
	}
	workload, err := workloadID(h.GetWorkload(), s.cfg.TrustDomain)
	if err != nil {
		return nil, refuse(codes.InvalidArgument, "workload: %v", err)
	}
	if err := s.speaksFor(who.id, workload, h.GetKind()); err != nil {
		return nil, err
	}
	sub := &subscription{s: s, st: st, who: who, key: subscriber{who.id, workload, h.GetKind()}, hash: h.GetHaveHash(), candidate: h.GetHaveCandidate()}
	if sub.endpoints, err = s.readEndpoints(st.Context(), h.GetEndpoints(), who.id, workload); err != nil {
		return nil, err
	}
	sub.announced = make([]bool, len(sub.endpoints))
	sub.proxy = mesh.Proxy{
		Agent: who.id, Workload: workload, Kind: h.GetKind(), Version: versionFromWire(h.GetVersion()),
		SVIDExpires: timeFromWire(h.GetSvidExpires()), Connected: true,
		Authorities: authoritiesFromWire(h.GetAuthorities()),
	}
	if sub.version = cmp.Or(sub.proxy.Version, "unknown"); h.GetShowsCalls() {
		sub.looks = make(chan *meshpb.Look)
	}
	s.mu.Lock()
	s.subs[sub.key]++
	s.live[who.id]++
	s.newest[sub.key] = sub
	s.mu.Unlock()
	sub.report()
	return sub, nil
}

func checkKind(kind string) error {
	if kind != KindSidecar && kind != KindGateway {
		return refuse(codes.InvalidArgument, "kind %.64q is neither %q nor %q", kind, KindSidecar, KindGateway)
	}
	return nil
}

// readEndpoints refuses an endpoint of a service that is another workload's, or
// at an address that the proxy has not shown to have. One of a service that no
// policy names yet waits for it.
func (s *Server) readEndpoints(ctx context.Context, in []*meshpb.Endpoint, agent, workload spiffeid.ID) ([]mesh.Endpoint, error) {
	if len(in) > maxEndpoints {
		return nil, refuse(codes.InvalidArgument, "%d endpoints, at most %d are announced by one proxy", len(in), maxEndpoints)
	}
	snap := s.cfg.Registry.Current()
	var out []mesh.Endpoint
	for _, w := range in {
		e, err := endpointFromWire(w, agent)
		if err != nil {
			return nil, refuse(codes.InvalidArgument, "%v", err)
		}
		if err := s.checkAddress(ctx, e, workload); err != nil {
			return nil, err
		}
		if snap == nil {
			out = append(out, e)
			continue
		}
		svc, ok := snap.Service(e.Service)
		if ok && svc.ID != workload {
			return nil, refuse(codes.PermissionDenied, "service %s is %s, which is not %s", e.Service, svc.ID, workload)
		}
		if !ok {
			s.cfg.Log.Warn("endpoint of a service that no policy names", slog.String("service", string(e.Service)), slog.String("workload", workload.String()))
		}
		out = append(out, e)
	}
	return out, nil
}

// close says that the proxy has left, unless it is there on another stream.
func (sub *subscription) close() {
	s := sub.s
	defer s.agents.lock(sub.who.id)()
	s.mu.Lock()
	s.subs[sub.key]--
	gone := s.subs[sub.key] <= 0
	if s.newest[sub.key] == sub {
		delete(s.newest, sub.key)
	}
	if gone {
		delete(s.subs, sub.key)
	}
	s.live[sub.who.id]--
	last := s.live[sub.who.id] <= 0
	if last {
		delete(s.live, sub.who.id)
	}
	s.mu.Unlock()
	if gone {
		s.demands.put(sub.key, nil)
		sub.proxy.Connected = false
		sub.report()
	}
	if !last {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(sub.st.Context()), drainTimeout)
	defer cancel()
	if err := s.cfg.Registry.Withdraw(ctx, sub.who.id); err != nil {
		s.cfg.Log.Error("withdraw endpoints failed", slog.String("agent", sub.who.id.String()), slog.Any("err", err))
	}
}

func (sub *subscription) report() {
	sub.proxy.LastSeen = sub.s.cfg.Now()
	sub.s.cfg.Registry.ReportProxy(sub.proxy)
}

// run is level-triggered: it looks at what is true now, tells the proxy what
// that proxy does not know, and waits for anything to change. Nothing queues.
func (sub *subscription) run(ctx context.Context) error {
	answers, ended := receive(ctx, sub.st, answerGap)
	refresh := time.NewTicker(sub.s.lease / 3)
	defer refresh.Stop()
	expiry := time.NewTimer(sub.who.leaf.NotAfter.Sub(sub.s.cfg.Now()) + time.Second)
	defer expiry.Stop()
	changed, forced := sub.s.cfg.Registry.Changed(), sub.syncForced()
	find := sub.s.cfg.Registry.HeldAgent
	if err := sub.step(ctx, find); err != nil {
		return err
	}
	for {
		find = sub.s.cfg.Registry.HeldAgent
		select {
		case m := <-answers:
			if err := sub.answer(m); err != nil {
				return err
			}
			continue
		case m := <-sub.looks:
			if err := sub.st.Send(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Look{Look: m}}); err != nil {
				return err
			}
			continue
		case err := <-ended:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-sub.s.stopping:
			return refuse(codes.Unavailable, "issuer is stopping")
		case <-forced:
		case <-refresh.C:
			clear(sub.announced)
			// What is held is true as far as this issuer hears of the others:
			// a proxy does not stay longer than this where it does not.
			if !sub.s.cfg.Alone {
				find = sub.s.cfg.Registry.GetAgent
			}
		case <-expiry.C:
		case <-changed:
		}
		// Taken before looking, so that a change during the look wakes again.
		changed, forced = sub.s.cfg.Registry.Changed(), sub.syncForced()
		if err := sub.step(ctx, find); err != nil {
			return err
		}
	}
}

// step checks that the proxy may still be here, by what find says of its agent,
// and brings it up to date.
func (sub *subscription) step(ctx context.Context, find findAgent) error {
	s := sub.s
	if err := s.judge(ctx, sub.who, find); err != nil {
		return err
	}
	entries := s.cfg.Registry.EntriesFor(sub.who.id)
	if err := s.mayBe(entries, sub.who.id, sub.key.workload, sub.key.kind); err != nil {
		return err
	}
	if err := errors.Join(sub.revoke(), sub.stopFaults()); err != nil {
		return err
	}
	snap, canary := s.cfg.Registry.SnapshotFor(sub.who.id, sub.key.workload, sub.key.kind)
	if err := sub.announce(ctx, snap); err != nil {
		return err
	}
	if err := sub.syncNow(entries); err != nil {
		return err
	}
	if snap == nil {
		return nil
	}
	from := &s.projections
	if canary {
		from = &s.tried
	}
	return sub.push(snap, from)
}

// announce makes known the endpoints that are due, each only while its service
// is this workload's.
func (sub *subscription) announce(ctx context.Context, snap *mesh.Snapshot) error {
	if snap == nil || !slices.Contains(sub.announced, false) {
		return nil
	}
	defer sub.s.agents.lock(sub.who.id)()
	for i, e := range sub.endpoints {
		svc, ok := snap.Service(e.Service)
		if sub.announced[i] || !ok || svc.ID != sub.key.workload {
			continue
		}
		if err := sub.s.cfg.Registry.Announce(ctx, e, sub.s.lease); err != nil {
			return fmt.Errorf("announce %s at %s: %w", e.Service, e.Address, err)
		}
		sub.announced[i] = true
	}
	return nil
}

// push sends the proxy's projection when its content is new, and the new
// revisions when only they are.
func (sub *subscription) push(snap *mesh.Snapshot, from *projections) error {
	own, err := from.of(snap, sub.key.kind, sub.key.workload)
	if err != nil {
		return err
	}
	m, wire := own.msg, own.whole
	sub.limits = own.limits
	switch {
	case m.Hash != sub.hash || own.candidate != sub.candidate:
	case m.Revision != sub.sentRevision || m.PolicyRevision != sub.sentPolicy:
		wire = own.same
	default:
		return nil
	}
	if own.tooLong > 0 && m.PolicyRevision != sub.sentPolicy {
		sub.s.cfg.Log.Error("the candidate is too large to be tried by this proxy beside what is in force", slog.String("workload", sub.key.workload.String()),
			slog.Int("bytes", own.tooLong), slog.Int("message", maxMessage))
	}
	sub.hash, sub.candidate, sub.sentRevision, sub.sentPolicy = m.Hash, own.candidate, m.Revision, m.PolicyRevision
	return sub.st.SendMsg(wire)
}

// answer takes what the proxy says of a snapshot, or says again.
func (sub *subscription) answer(m *meshpb.SubscribeRequest) error {
	ack, nack := m.GetAck(), m.GetNack()
	revision, revoked, expires, authorities, traffic := ack.GetRevision(), ack.GetRevoked(), ack.GetSvidExpires(), ack.GetAuthorities(), ack.GetTraffic()
	if nack != nil {
		revision, revoked, expires, authorities, traffic = nack.GetRevision(), nack.GetRevoked(), nack.GetSvidExpires(), nack.GetAuthorities(), nack.GetTraffic()
	}
	switch {
	case ack == nil && nack == nil:
		return refuse(codes.InvalidArgument, "a message after the hello is an ack or a nack")
	case revision > sub.sentRevision:
		return refuse(codes.InvalidArgument, "revision %d was never sent", revision)
	case ack != nil:
		// A proxy may hold more than an issuer that was set back has.
		sub.proxy.State, sub.proxy.Reason, sub.proxy.Revision = "", "", revision
		sub.proxy.PolicyRevision = min(ack.GetPolicyRevision(), sub.sentPolicy)
		sub.proxy.Verified = ack.GetVerified()
		sub.tried(ack)
	case revision == sub.sentRevision:
		reason := plain(nack.GetReason())
		if sub.proxy.State != mesh.Rejected || sub.proxy.PolicyRevision != sub.sentPolicy || sub.proxy.Reason != reason {
			sub.s.cfg.Log.Warn("proxy rejected a snapshot", slog.String("workload", sub.key.workload.String()),
				slog.Uint64("revision", revision), slog.Uint64("policy", sub.sentPolicy), slog.String("reason", reason))
		}
		sub.proxy.State, sub.proxy.Reason, sub.proxy.PolicyRevision = mesh.Rejected, reason, sub.sentPolicy
	}
	// The nack of an older revision says nothing: that of the newest follows.
	if t := timeFromWire(expires); !t.IsZero() {
		sub.proxy.SVIDExpires = t
	}
	sub.proxy.Authorities = authoritiesFromWire(authorities)
	sub.proxy.Revoked = min(revoked, sub.revoked)
	err := sub.carries(traffic)
	sub.report()
	return err
}

// tried takes what the proxy says of the candidate.
func (sub *subscription) tried(ack *meshpb.Ack) {
	why := plain(ack.GetCandidateRefused())
	if why != "" && why != sub.proxy.CandidateRefused {
		sub.s.cfg.Log.Warn("proxy does not try the candidate", slog.String("workload", sub.key.workload.String()),
			slog.Uint64("policy", sub.sentPolicy), slog.String("reason", why))
	}
	sub.proxy.CandidateRefused = why
}

// plain makes a peer's words fit for a table and a log line.
func plain(s string) string {
	if len(s) > maxReason {
		s = strings.Clone(s[:maxReason]) // the rest is not held
	}
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.In(r, unicode.Cc, unicode.Zl, unicode.Zp):
			return ' '
		case unicode.Is(unicode.Cf, r): // such as turn the direction of what follows
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// receive reads a stream into a channel, so that a handler can wait for more
// than its peer. A peer that sends faster than one message in each gap waits,
// by the flow control of the stream. ended yields nil at the end of the stream.
func receive[Req, Resp any](ctx context.Context, st grpc.BidiStreamingServer[Req, Resp], gap time.Duration) (<-chan *Req, <-chan error) {
	got, ended := make(chan *Req), make(chan error, 1)
	go func() {
		var last time.Time
		for {
			m, err := st.Recv()
			if errors.Is(err, io.EOF) {
				err = nil
				ended <- err
				return
			}
			if err != nil {
				ended <- err
				return
			}
			if gap > 0 {
				if early := gap - time.Since(last); early > 0 && !pause(ctx, early) {
					return
				}
			}
			select {
			case got <- m:
				last = time.Now()
			case <-ctx.Done():
				return
			}
		}
	}()
	return got, ended
}

// pause waits; false means that ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// UploadAudit keeps the lines of one agent's proxies. The acknowledgement is
// sent once the lines are durable.
func (a *meshAPI) UploadAudit(st grpc.BidiStreamingServer[meshpb.AuditBatch, meshpb.AuditAck]) error {
	ctx := st.Context()
	who, err := callerOf(ctx)
	if err != nil {
		return err
	}
	// As with Subscribe: the proxy knows by the header that it may go on.
	if err := st.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	batches, ended := receive(ctx, st, 0)
	for {
		select {
		case <-a.s.stopping:
			return refuse(codes.Unavailable, "issuer is stopping")
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			return err
		case b := <-batches:
			if err := a.keep(ctx, who, b); err != nil {
				return err
			}
			if err := st.Send(&meshpb.AuditAck{LastSeq: b.GetLastSeq()}); err != nil {
				return err
			}
		}
	}
}

func (a *meshAPI) keep(ctx context.Context, who caller, b *meshpb.AuditBatch) error {
	if err := a.s.authorize(ctx, who); err != nil {
		return err
	}
	workload, err := workloadID(b.GetWorkload(), a.s.cfg.TrustDomain)
	if err != nil {
		return refuse(codes.InvalidArgument, "workload: %v", err)
	}
	if !a.s.entitled(who.id, workload) {
		return a.s.errNotEntitled(who.id, workload)
	}
	if n := len(b.GetLines()); n == 0 || n > maxAuditLines {
		return refuse(codes.InvalidArgument, "%d audit lines in a batch, want 1 to %d", n, maxAuditLines)
	}
	size := 0
	for _, line := range b.GetLines() {
		size += len(line)
		if len(line) == 0 || len(line) > maxAuditLine || bytes.ContainsAny(line, "\r\n") {
			return refuse(codes.InvalidArgument, "an audit line is one line of 1 to %d bytes", maxAuditLine)
		}
	}
	for {
		wait, ok := a.s.uploads.take(who.id.String(), float64(size), a.s.cfg.Now())
		if ok {
			break
		}
		if !pause(ctx, max(wait, time.Millisecond)) {
			return ctx.Err()
		}
	}
	if err := a.s.cfg.Audit.Receive(ctx, who.id, workload, b.GetLines()); err != nil {
		return fmt.Errorf("keep audit of %s: %w", workload, err)
	}
	return nil
}
