package control

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

const (
	// maxLooks bounds the looks at calls that pass the issuer at once.
	maxLooks = 32
	// lookWait is how long a proxy has to answer one.
	lookWait = 5 * time.Second
	// showGap is the least time between two messages of shown calls, maxShown how
	// many one has, maxTapped how many bytes each.
	showGap   = 50 * time.Millisecond
	maxShown  = 64
	maxTapped = 256 << 10
	// takeWait is how long an operator has to take the last calls of a look.
	takeWait = time.Second
	// lookSlack is by how much a proxy may find sooner than we that the time is over.
	lookSlack = 250 * time.Millisecond
	// rightEvery is how often the right of who looks is asked for again.
	rightEvery = 5 * time.Second
)

// A look is that of an operator at the calls of one proxy. It is known by a secret,
// which the proxy answers with.
type look struct {
	of subscriber
	// begun is what the proxy answers, calls what it shows; gone is closed once it
	// shows nothing more, done once nobody looks.
	begun      chan error
	calls      chan [][]byte
	gone, done chan struct{}
}

func (l *look) over() error {
	return refuse(codes.FailedPrecondition, "the proxy of %s shows no more calls: it has ended, or connected anew; look again", l.of.workload)
}

// looks are those that are open.
type looks struct {
	mu   sync.Mutex
	n    int
	open map[string]*look // that no proxy has answered yet; guarded by mu, as n
}

// begin opens a look. end may be called twice.
func (ls *looks) begin(of subscriber) (id string, l *look, end func(), err error) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.n >= maxLooks {
		return "", nil, nil, refuse(codes.ResourceExhausted, "%d look at calls through this issuer already, which is the limit: end one", ls.n)
	}
	if ls.open == nil {
		ls.open = map[string]*look{}
	}
	id = rand.Text()
	l = &look{of: of, begun: make(chan error, 1), calls: make(chan [][]byte), gone: make(chan struct{}), done: make(chan struct{})}
	ls.n++
	ls.open[id] = l
	return id, l, sync.OnceFunc(func() {
		close(l.done)
		ls.mu.Lock()
		defer ls.mu.Unlock()
		ls.n--
		delete(ls.open, id)
	}), nil
}

// answer gives out a look to the proxy of an agent that was asked, once.
func (ls *looks) answer(id string, agent spiffeid.ID) *look {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.open[id]
	if l == nil || l.of.agent != agent {
		return nil
	}
	delete(ls.open, id)
	return l
}

// lookedAt finds the proxy whose calls are to be shown.
func (s *Server) lookedAt(workload, agent spiffeid.ID) (*subscription, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []*subscription
	for key, sub := range s.newest {
		if key.workload == workload && (agent.IsZero() || key.agent == agent) {
			found = append(found, sub)
		}
	}
	switch len(found) {
	case 0:
		return nil, refuse(codes.NotFound, "no such proxy of %s is connected to this issuer; sallyport status lists them, and with several issuers each knows its own", workload)
	case 1:
	default:
		var names []string
		for _, sub := range found {
			names = append(names, sub.key.agent.String())
		}
		slices.Sort(names)
		return nil, refuse(codes.FailedPrecondition, "%d proxies of %s are connected; name one by its agent: %s", len(found), workload, strings.Join(names[:min(len(names), 8)], ", "))
	}
	if sub := found[0]; sub.looks != nil {
		return sub, nil
	}
	return nil, refuse(codes.FailedPrecondition, "the proxy of %s is of an older version (%s), which shows calls on its own machine at most: tap it there, or upgrade it", workload, found[0].version)
}

// A tapQuestion is what TapRequest says.
type tapQuestion struct {
	workload, agent spiffeid.ID
	filter          mesh.TapFilter
	within          time.Duration
}

func tapFromWire(w *meshpb.TapRequest, td spiffeid.TrustDomain) (q tapQuestion, err error) {
	if q.workload, err = workloadID(w.GetWorkload(), td); err != nil {
		return q, refuse(codes.InvalidArgument, "workload: %v", err)
	}
	if w.GetAgent() != "" {
		if q.agent, err = workloadID(w.GetAgent(), td); err != nil {
			return q, refuse(codes.InvalidArgument, "agent: %v", err)
		}
	}
	if q.filter, err = mesh.ParseTapFilter(w.GetFilter()); err != nil {
		return q, refuse(codes.InvalidArgument, "filter: %s", plain(err.Error()))
	}
	q.within, err = lookTime(w.GetSeconds())
	return q, err
}

func lookTime(secs int64) (time.Duration, error) {
	if secs < 0 || secs > int64(mesh.LongestTap/time.Second) {
		return 0, refuse(codes.InvalidArgument, "%d seconds: calls are shown for 1 to %d, 0 stands for the most", secs, int64(mesh.LongestTap/time.Second))
	}
	if secs == 0 {
		return mesh.LongestTap, nil
	}
	return time.Duration(secs) * time.Second, nil
}

// Tap shows the calls of a proxy to an operator.
func (a *adminAPI) Tap(req *meshpb.TapRequest, st grpc.ServerStreamingServer[meshpb.TapResponse]) error {
	ctx := st.Context()
	q, err := tapFromWire(req, a.s.cfg.TrustDomain)
	if err != nil {
		return err
	}
	if err := a.s.may(ctx, q.workload); err != nil {
		return err
	}
	o, _, _ := a.s.verdict(ctx, q.workload)
	sub, err := a.s.lookedAt(q.workload, q.agent)
	if err != nil {
		return err
	}
	id, l, end, err := a.s.looks.begin(sub.key)
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := context.WithTimeout(ctx, q.within)
	defer cancel()
	defer context.AfterFunc(ctx, end)() // whoever takes nothing holds no place
	if err := a.s.ask(ctx, sub, l, &meshpb.Look{Id: id, By: byWhom(ctx), Filter: q.filter.Query(), Seconds: int64(q.within / time.Second)}); err != nil {
		return err
	}
	if err := st.Send(&meshpb.TapResponse{}); err != nil {
		return err
	}
	var failed error
	passed := make(chan struct{})
	go func() {
		defer close(passed)
		failed = l.pass(st)
	}()
	defer func() {
		end()
		select {
		case <-passed:
		case <-time.After(takeWait):
		}
	}()
	right := time.NewTicker(rightEvery)
	defer right.Stop()
	var expired <-chan time.Time // never for the local user
	if !o.until.IsZero() {
		t := time.NewTimer(o.until.Sub(a.s.cfg.Now()))
		defer t.Stop()
		expired = t.C
	}
	for {
		select {
		case <-passed:
			return failed
		case <-right.C:
			if o, ok, _ := a.s.verdict(ctx, q.workload); !ok || a.s.cfg.Registry.Revocations().Has(o.serial) {
				return refuse(codes.PermissionDenied, "the right to look at calls of %s was withdrawn", q.workload)
			}
		case <-expired:
			return refuse(codes.PermissionDenied, "SVID of %s expired at %s: look again with a new one", o.id, stamp(o.until))
		case <-ctx.Done():
			return st.Context().Err() // nil when the time is over
		case <-l.gone:
			if until, _ := ctx.Deadline(); ctx.Err() != nil || time.Until(until) < lookSlack { // which has it go
				return st.Context().Err()
			}
			return l.over()
		case <-a.s.stopping:
			return refuse(codes.Unavailable, "issuer is stopping")
		}
	}
}

// pass sends what the proxy shows until the look ends, or for as long as an operator
// who reads nothing keeps the stream.
func (l *look) pass(st grpc.ServerStreamingServer[meshpb.TapResponse]) error {
	for {
		select {
		case calls := <-l.calls:
			if err := st.Send(&meshpb.TapResponse{Calls: calls}); err != nil {
				return err
			}
		case <-l.done:
			return nil
		}
	}
}

// ask has a proxy show its calls, and waits until it does.
func (s *Server) ask(ctx context.Context, sub *subscription, l *look, m *meshpb.Look) error {
	late := time.NewTimer(lookWait)
	defer late.Stop()
	silent := func() error {
		return refuse(codes.FailedPrecondition, "the proxy of %s did not answer within %s; is it still connected? sallyport status", sub.key.workload, lookWait)
	}
	select {
	case sub.looks <- m:
	case <-late.C:
		return silent()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-l.begun:
		return err
	case <-l.gone:
		select {
		case err := <-l.begun: // which comes before
			return err
		default:
			return l.over()
		}
	case <-late.C:
		return silent()
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopping:
		return refuse(codes.Unavailable, "issuer is stopping")
	}
}

// ShowCalls takes the calls that a proxy shows, for whoever looks at them.
func (a *meshAPI) ShowCalls(st grpc.BidiStreamingServer[meshpb.ShownCalls, meshpb.ShownAck]) error {
	ctx := st.Context()
	who, err := callerOf(ctx)
	if err != nil {
		return err
	}
	first, err := firstMessage(st, a.s.hello)
	if err != nil {
		return err
	}
	l := a.s.looks.answer(first.GetLook(), who.id)
	if l == nil {
		return refuse(codes.NotFound, "nobody looks at calls of agent %s by that name, any more", who.id)
	}
	defer close(l.gone)
	if err := st.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	messages, ended := receive(ctx, st, showGap)
	begun := false
	for {
		select {
		case m := <-messages:
			if err := checkShown(m); err != nil {
				return err
			}
			if !begun {
				begun = true
				if m.GetRefused() != "" {
					l.begun <- refuse(codes.FailedPrecondition, "the proxy of %s shows nothing: %s", l.of.workload, plain(m.GetRefused()))
					return nil
				}
				l.begun <- nil
			}
			if len(m.GetCalls()) == 0 {
				continue
			}
			select {
			case l.calls <- m.GetCalls():
			case <-l.done:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		case <-l.done:
			return nil
		case err := <-ended:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-a.s.stopping:
			return refuse(codes.Unavailable, "issuer is stopping")
		}
	}
}

// checkShown refuses what no proxy of ours shows.
func checkShown(m *meshpb.ShownCalls) error {
	if n := len(m.GetCalls()); n > maxShown {
		return refuse(codes.InvalidArgument, "%d calls in a message, at most %d", n, maxShown)
	}
	for _, b := range m.GetCalls() {
		if _, err := tappedFromWire(b); err != nil {
			return refuse(codes.InvalidArgument, "%s", plain(err.Error()))
		}
	}
	return nil
}

func tappedFromWire(b []byte) (t mesh.Tapped, err error) {
	if len(b) > maxTapped {
		return t, fmt.Errorf("a call of %d bytes is shown, at most %d are", len(b), maxTapped)
	}
	if err := json.Unmarshal(b, &t); err != nil {
		return t, fmt.Errorf("what is shown is no call: %w", err)
	}
	return t, nil
}
