package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// The pause between attempts to connect doubles from retryMin to retryMax and
// is then drawn between nothing and that (full jitter), so that proxies do not
// return in step after an issuer's restart.
const (
	retryMin = 200 * time.Millisecond
	retryMax = 10 * time.Second
)

// askTraffic is how often a proxy looks whether there is news of its traffic.
const askTraffic = time.Second

// A Hello says who subscribes.
type Hello struct {
	// Kind is KindSidecar or KindGateway.
	Kind string
	// Version is what the program was built from, for operators.
	Version string
	// Workload that the proxy serves; the agent needs an entry for it.
	Workload spiffeid.ID
	// Endpoints of the workload's services. Their Agent is not read.
	Endpoints []mesh.Endpoint
	// Have is the snapshot in force already, or nil. It is not sent again.
	Have *mesh.Snapshot
	// HaveCandidate are the rows that are tried already, or nil.
	HaveCandidate *mesh.Snapshot
	// SVIDExpires, when set, is asked with each answer for the operator's table.
	SVIDExpires func() time.Time
	// Authorities, when set, is asked with each answer: what the proxy trusts
	// and shows. Without it the proxy holds up a replacement of the root.
	Authorities func() *mesh.Authorities
	// Changed, when set, returns a channel that is closed when SVIDExpires or
	// Authorities has another answer; the last answer is then repeated at once.
	Changed func() <-chan struct{}
	// Decode reads the body of a snapshot and says the hash of its content. A
	// process with many subscriptions decodes what they share once. Default:
	// mesh.DecodeSnapshot and its ContentHash.
	Decode func(body []byte) (s *mesh.Snapshot, hash string, err error)
	// Vouch, when set, is called before a snapshot is handed over with the hash of
	// the signed set that it comes from, empty when it names none. An error
	// refuses the snapshot. fetch gets the set; its error, passed on, ends the
	// stream instead: what nobody could look at is not refused.
	Vouch func(ctx context.Context, set string, fetch func() ([]byte, error)) error
	// OnState, when set, is told nil when connected and why when not.
	OnState func(error)
	// Steering, when set, is asked what the proxy carries, and told what concerns
	// that. Its functions are called as those of the Handler are.
	Steering *Steering
	// Show, when set, shows calls to an operator who has asked the issuer, until ctx
	// ends. It is called for each in a goroutine of its own.
	Show func(ctx context.Context, l Look) error
}

// A Handler acts on what the issuer pushes. Its methods are called one at a
// time and hold up the stream: they return soon.
type Handler interface {
	// OnSnapshot puts a snapshot in force, wholly or not at all. An error
	// keeps the former one in force and is told to the issuer.
	OnSnapshot(ctx context.Context, s *mesh.Snapshot) error
	// OnCandidate is called after OnSnapshot: the rows are to be tried beside
	// those in force, of the same policy revision; nil means none. An error
	// says that none are tried and is told to the issuer. What is in force
	// must not hang on it.
	OnCandidate(ctx context.Context, rows *mesh.Snapshot) error
	// OnSyncNow is called when entries, bundle and SVIDs should be fetched;
	// always once after connecting.
	OnSyncNow(ctx context.Context)
	// OnRevoked adds to the X.509-SVIDs that are not to be believed any more.
	// It is called again with what it was told before.
	OnRevoked(ctx context.Context, list []mesh.RevokedSVID)
}

// subscriberState is what outlives a stream.
type subscriberState struct {
	hello   Hello
	handler Handler
	// inForce is the snapshot that the handler accepted last.
	inForce *mesh.Snapshot
	// candidate are the rows that are tried, refused is why those sent last
	// are not.
	candidate *mesh.Snapshot
	refused   string
	// rejected is why the content sent last was refused; empty when it was not.
	// rejectedSet is the signed set that it came from.
	rejected, rejectedSet string
	// fetch gets a signed set over the link of the stream.
	fetch func(ctx context.Context, hash string) ([]byte, error)
	// shows answers looks over that link. What hangs in one holds up no new stream.
	shows   *shows
	looking looking
	// told is the revision answered last.
	told uint64
	// said is what was said of the traffic last, stopped the revision of the stops
	// of faults in force.
	said    *mesh.Traffic
	stopped uint64
	// revoked is the revision of the revocations in force; spoiled says that
	// some were not understood, so that nothing more is confirmed.
	revoked uint64
	spoiled bool
}

// Subscribe keeps the handler on the newest snapshot until ctx ends, over every
// loss of the connection. It returns nil then; an error wraps ErrMustReattest
// or ErrBanned.
func (c *Client) Subscribe(ctx context.Context, hello Hello, h Handler) error {
	s := &subscriberState{hello: hello, handler: h, inForce: hello.Have, candidate: hello.HaveCandidate}
	s.looking.at = make(chan struct{}, maxAnswered)
	defer s.looking.running.Wait()
	return c.persist(ctx, "subscribe", hello.OnState, func(ctx context.Context, up func()) error {
		return c.subscribeOnce(ctx, s, up)
	})
}

// persist runs once again and again until ctx ends or trying is vain. once calls
// up when it got through; the pause starts over then.
func (c *Client) persist(ctx context.Context, verb string, state func(error), once func(context.Context, func()) error) error {
	if state == nil {
		state = func(error) {}
	}
	for pause := c.retryMin; ; pause = min(2*pause, c.retryMax) {
		before := pause
		err := once(ctx, func() {
			pause = c.retryMin
			c.cfg.Log.Info("connected to issuer", slog.String("for", verb))
			state(nil)
		})
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end that was asked for
		}
		if err == nil {
			pause = c.retryMin
			continue
		}
		if errors.Is(err, ErrUnfetched) {
			pause = before // that it got through helped nothing
		}
		state(err)
		if final(err) {
			return err
		}
		c.cfg.Log.Warn("issuer connection lost", slog.String("for", verb), slog.Any("err", err))
		t := time.NewTimer(rand.N(pause) + time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// subscribeOnce runs one stream. It returns nil when a new agent SVID asks for
// a new connection.
func (c *Client) subscribeOnce(ctx context.Context, s *subscriberState, up func()) error {
	const verb = "subscribe"
	l, err := c.acquire()
	if err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	defer c.release(l)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.shows = &shows{ctx: ctx, c: c, l: l, show: s.hello.Show, looking: &s.looking}
	st, err := meshpb.NewMeshClient(l.cc).Subscribe(ctx)
	if err != nil {
		return c.explain(ctx, verb, l, err)
	}
	_ = st.Send(s.greeting())
	if err := accepted(st, cancel); err != nil {
		return c.explain(ctx, verb, l, err)
	}
	up()
	s.fetch = func(ctx context.Context, hash string) ([]byte, error) { return c.fetchSet(ctx, l, &s.hello, hash) }
	got, ended := receiveClient(ctx, st)
	alive := time.NewTicker(c.alive)
	defer alive.Stop()
	look := time.NewTicker(c.look)
	defer look.Stop()
	ask := time.NewTicker(askTraffic)
	defer ask.Stop()
	changed := s.changed()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
			if changed = s.changed(); s.told == 0 {
				continue
			}
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("%s: %w: the issuer ended the stream", verb, ErrUnreachable)
			}
			return c.explain(ctx, verb, l, err)
		case m := <-got:
			wants, err := c.hear(ctx, s, m)
			if err != nil {
				return fmt.Errorf("%s: %w", verb, err)
			}
			if !wants {
				continue
			}
		case <-ask.C:
			if !s.news() {
				continue
			}
		case <-look.C:
			if c.moved(l) {
				return nil
			}
			continue
		case <-alive.C:
			if s.told == 0 {
				continue
			}
		case <-l.stale:
			return nil
		}
		if err := st.Send(s.answer()); err != nil {
			// The reason arrives at ended.
			continue
		}
	}
}

// hear acts on one message and reports whether it wants an answer. An error ends
// the stream.
func (c *Client) hear(ctx context.Context, s *subscriberState, m *meshpb.SubscribeResponse) (answer bool, err error) {
	if err := s.distrust(ctx, m.GetRevocations()); err != nil {
		c.cfg.Log.Error("revocations not understood, nothing more is confirmed to the issuer; next: upgrade this proxy", slog.Any("err", err))
	}
	if look := m.GetLook(); look != nil {
		if s.hello.Show != nil {
			s.shows.answer(look)
		}
		return false, nil
	}
	is, answer, err := s.steer(m)
	if err != nil {
		c.cfg.Log.Error("what concerns traffic not understood, and not confirmed to the issuer; next: upgrade this proxy", slog.Any("err", err))
	}
	if is {
		return answer, nil
	}
	return s.take(ctx, m)
}

// accepted waits for the header, by which the issuer accepts a stream.
func accepted(st grpc.ClientStream, cancel func()) error {
	t := time.AfterFunc(2*helloTimeout, cancel)
	defer t.Stop()
	md, err := st.Header()
	if err == nil && md == nil {
		// The stream ended without a header: its status says why.
		err = st.RecvMsg(&meshpb.SubscribeResponse{})
	}
	return err
}

func (s *subscriberState) greeting() *meshpb.SubscribeRequest {
	h := &meshpb.Hello{Kind: s.hello.Kind, Version: s.hello.Version, Workload: s.hello.Workload.String(), SvidExpires: s.expires(), Authorities: s.authorities(), ShowsCalls: s.hello.Show != nil}
	for _, e := range s.hello.Endpoints {
		h.Endpoints = append(h.Endpoints, &meshpb.Endpoint{Service: string(e.Service), Address: e.Address.String(), Labels: e.Labels.Map()})
	}
	if s.inForce != nil {
		h.HaveRevision, h.HaveHash = s.inForce.Revision, s.inForce.ContentHash()
	}
	if s.candidate != nil {
		h.HaveCandidate = s.candidate.ContentHash()
	}
	// What was rejected is offered again on a new stream.
	s.rejected, s.rejectedSet, s.refused, s.told = "", "", "", 0
	// Another issuer's store may count otherwise.
	s.revoked, s.spoiled = 0, false
	s.said, s.stopped = nil, 0
	return &meshpb.SubscribeRequest{Message: &meshpb.SubscribeRequest_Hello{Hello: h}}
}

// changed is never closed when the hello says nothing of changes.
func (s *subscriberState) changed() <-chan struct{} {
	if s.hello.Changed == nil {
		return nil
	}
	return s.hello.Changed()
}

func (s *subscriberState) expires() *timestamppb.Timestamp {
	if s.hello.SVIDExpires == nil {
		return nil
	}
	return timeToWire(s.hello.SVIDExpires())
}

func (s *subscriberState) authorities() *meshpb.Authorities {
	if s.hello.Authorities == nil {
		return nil
	}
	return authoritiesToWire(s.hello.Authorities())
}

// take acts on one message and reports whether it wants an answer. An error ends
// the stream.
func (s *subscriberState) take(ctx context.Context, m *meshpb.SubscribeResponse) (answer bool, err error) {
	switch {
	case m.GetSyncNow() != nil:
		s.handler.OnSyncNow(ctx)
		return false, nil
	case m.GetRevocations() != nil:
		return s.told > 0, nil // otherwise the answer to a snapshot says it
	case m.GetSnapshot() != nil:
		s.told = m.GetSnapshot().GetRevision()
		return true, s.use(ctx, m.GetSnapshot())
	case m.GetSame() != nil:
		s.told = m.GetSame().GetRevision()
		return true, s.renumber(ctx, m.GetSame())
	}
	// A message of a newer issuer: nothing to do.
	return false, nil
}

// use puts a snapshot in force, or remembers why it was refused.
func (s *subscriberState) use(ctx context.Context, m *meshpb.Snapshot) error {
	snap, err := readSnapshot(m, s.hello.Decode)
	if err == nil {
		err = s.handOver(ctx, snap)
	}
	if err != nil {
		return s.reject(err, m.GetPolicySet())
	}
	s.inForce, s.rejected = snap, ""
	rows, err := readCandidate(m)
	s.try(ctx, rows, err)
	return nil
}

func (s *subscriberState) handOver(ctx context.Context, snap *mesh.Snapshot) error {
	if err := s.vouch(ctx, snap.PolicySet); err != nil {
		return err
	}
	return s.handler.OnSnapshot(ctx, snap)
}

// reject remembers why a snapshot was refused, unless nobody could look at it.
func (s *subscriberState) reject(err error, set string) error {
	if errors.Is(err, ErrUnfetched) {
		return err
	}
	s.rejected, s.rejectedSet = reasonText(err), set
	return nil
}

// try hands on the rows to try, or why there are none.
func (s *subscriberState) try(ctx context.Context, rows *mesh.Snapshot, err error) {
	err = errors.Join(err, s.handler.OnCandidate(ctx, rows))
	s.candidate, s.refused = rows, ""
	if err != nil {
		s.candidate, s.refused = nil, reasonText(err)
	}
}

// readCandidate returns the rows to try, nil when there are none.
func readCandidate(m *meshpb.Snapshot) (*mesh.Snapshot, error) {
	if len(m.GetCandidate()) == 0 {
		return nil, nil
	}
	rows, err := mesh.DecodeSnapshot(m.GetCandidate())
	if err != nil {
		return nil, fmt.Errorf("candidate: %w", err)
	}
	if rows.PolicyRevision != m.GetPolicyRevision() {
		return nil, fmt.Errorf("candidate is of policy revision %d, its envelope says %d", rows.PolicyRevision, m.GetPolicyRevision())
	}
	return rows, nil
}

// readSnapshot checks that the body is what the envelope says.
func readSnapshot(m *meshpb.Snapshot, decode func([]byte) (*mesh.Snapshot, string, error)) (*mesh.Snapshot, error) {
	if decode == nil {
		decode = decodeSnapshot
	}
	snap, hash, err := decode(m.GetBody())
	if err != nil {
		return nil, err
	}
	if snap.Revision != m.GetRevision() || snap.PolicyRevision != m.GetPolicyRevision() {
		return nil, fmt.Errorf("snapshot is of revision %d, its envelope says %d", snap.Revision, m.GetRevision())
	}
	if hash != m.GetHash() {
		return nil, fmt.Errorf("snapshot has hash %.16s, its envelope says %.16s", hash, m.GetHash())
	}
	if set := m.GetPolicySet(); set != "" {
		own := *snap // others may have decoded the same
		own.PolicySet = set
		snap = &own
	}
	return snap, nil
}

func decodeSnapshot(body []byte) (*mesh.Snapshot, string, error) {
	snap, err := mesh.DecodeSnapshot(body)
	if err != nil {
		return nil, "", err
	}
	return snap, snap.ContentHash(), nil
}

// renumber puts the content in force under new revisions. What was rejected
// stays so, unless another set vouches for it now: then it is asked for anew.
func (s *subscriberState) renumber(ctx context.Context, m *meshpb.Same) error {
	if s.rejected != "" {
		if s.hello.Vouch != nil && m.GetPolicySet() != s.rejectedSet {
			return fmt.Errorf("%w: another one vouches for what was refused, which is to be sent anew", ErrUnfetched)
		}
		return nil
	}
	if s.inForce == nil {
		s.rejected = "the issuer calls unchanged what this proxy does not have"
		return nil
	}
	if s.inForce.Revision == m.GetRevision() && s.inForce.PolicyRevision == m.GetPolicyRevision() && s.inForce.PolicySet == m.GetPolicySet() {
		return nil
	}
	next := *s.inForce
	next.Revision, next.PolicyRevision, next.PolicyHash, next.PolicySet = m.GetRevision(), m.GetPolicyRevision(), m.GetPolicyHash(), m.GetPolicySet()
	if err := s.handOver(ctx, &next); err != nil {
		return s.reject(err, m.GetPolicySet())
	}
	s.inForce = &next
	if s.refused != "" {
		return nil
	}
	var rows *mesh.Snapshot
	if s.candidate != nil {
		same := *s.candidate
		same.PolicyRevision, same.PolicyHash = m.GetPolicyRevision(), m.GetPolicyHash()
		rows = &same
	}
	s.try(ctx, rows, nil)
	return nil
}

func reasonText(err error) string {
	if text := plain(err.Error()); text != "" {
		return text
	}
	return "rejected without a reason"
}

// answer is the ack or nack of what was sent last; repeated, a sign of life.
func (s *subscriberState) answer() *meshpb.SubscribeRequest {
	var policy uint64
	if s.inForce != nil {
		policy = s.inForce.PolicyRevision
	}
	if s.rejected != "" {
		return &meshpb.SubscribeRequest{Message: &meshpb.SubscribeRequest_Nack{Nack: &meshpb.Nack{
			Revision: s.told, Reason: s.rejected, PolicyRevision: policy, SvidExpires: s.expires(), Authorities: s.authorities(), Revoked: s.revoked, Traffic: s.traffic(),
		}}}
	}
	return &meshpb.SubscribeRequest{Message: &meshpb.SubscribeRequest_Ack{Ack: &meshpb.Ack{
		Revision: s.told, PolicyRevision: policy, SvidExpires: s.expires(), Authorities: s.authorities(), Revoked: s.revoked, Traffic: s.traffic(),
		CandidateRefused: s.refused, Verified: s.hello.Vouch != nil && s.inForce != nil,
	}}}
}

// receiveClient reads a stream into a channel until ctx or the stream ends.
func receiveClient[Req, Resp any](ctx context.Context, st grpc.BidiStreamingClient[Req, Resp]) (<-chan *Resp, <-chan error) {
	got, ended := make(chan *Resp), make(chan error, 1)
	go func() {
		for {
			m, err := st.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case got <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	return got, ended
}
