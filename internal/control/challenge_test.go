package control

import (
	"context"
	"crypto"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// riddle is a Challenger: the answer to "2+2" is "4".
type riddle struct{}

func (riddle) Verify(context.Context, []byte, crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	return spiffeid.ID{}, nil, errUsed
}

func (riddle) VerifyAnswer(_ context.Context, payload []byte, _ crypto.PublicKey, ask func([]byte) ([]byte, error)) (spiffeid.ID, []mesh.Selector, error) {
	answer, err := ask([]byte("2+2"))
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	if string(answer) != "4" {
		return spiffeid.ID{}, nil, errUsed
	}
	id, err := spiffeid.FromSegments(td, "spire", "agent", "riddle", string(payload))
	return id, []mesh.Selector{{Type: "riddle", Value: "solved:yes"}}, err
}

type onceRiddle struct{ riddle }

func (onceRiddle) Once() bool { return true }

func TestOnlyEvidenceForAnyKeyIsReattestable(t *testing.T) {
	for _, c := range []struct {
		v    NodeVerifier
		want bool
	}{{tokens{}, false}, {riddle{}, true}, {onceRiddle{}, false}} {
		if got := reattestable(c.v); got != c.want {
			t.Errorf("%T: %t, want %t", c.v, got, c.want)
		}
	}
}

func TestAChallengeIsAnswered(t *testing.T) {
	r := newRig(t, newCA(t, td), func(c *ServerConfig) { c.Verifiers["riddle"] = riddle{} })
	c := r.client(&holder{})
	say := func(s string, err error) func([]byte) ([]byte, error) {
		return func(challenge []byte) ([]byte, error) {
			if string(challenge) != "2+2" {
				t.Errorf("challenge %q", challenge)
			}
			return []byte(s), err
		}
	}
	got, err := c.AttestAnswering(t.Context(), "riddle", []byte("sphinx"), say("4", nil), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	if a, err := r.reg.GetAgent(t.Context(), got.ID); err != nil || len(a.Selectors) != 1 || a.AttestationType != "riddle" {
		t.Errorf("the agent is on record as %+v", a)
	}
	if _, err := c.AttestAnswering(t.Context(), "riddle", []byte("x"), say("5", nil), newKey(t)); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("a wrong answer: %v", err)
	}
	if _, err := c.AttestAnswering(t.Context(), "riddle", []byte("x"), say("", errBroken), newKey(t)); !errors.Is(err, errBroken) {
		t.Errorf("no answer: %v", err)
	}
	if _, err := c.Attest(t.Context(), "riddle", []byte("x"), newKey(t)); err == nil {
		t.Error("attested without an answer")
	}
}

func TestAChallengeIsNotWaitedForLong(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c := r.client(&holder{})
	csr, err := request(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		say   func(agentv1.Agent_AttestAgentClient)
		hello time.Duration
		want  codes.Code
	}{
		"silence":  {func(agentv1.Agent_AttestAgentClient) {}, 2 * time.Second, codes.DeadlineExceeded},
		"the end":  {func(st agentv1.Agent_AttestAgentClient) { st.CloseSend() }, time.Minute, codes.InvalidArgument},
		"an empty": {func(st agentv1.Agent_AttestAgentClient) { st.Send(&agentv1.AttestAgentRequest{}) }, time.Minute, codes.InvalidArgument},
	} {
		r.stop()
		r.tune = func(s *Server) { s.hello = tt.hello }
		r.start(func(c *ServerConfig) { c.Verifiers["riddle"] = riddle{} })
		l, err := c.open(nil)
		if err != nil {
			t.Fatal(err)
		}
		st, err := agentv1.NewAgentClient(l.cc).AttestAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		st.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
			Data: &types.AttestationData{Type: "riddle", Payload: []byte("x")}, Params: &agentv1.AgentX509SVIDParams{Csr: csr},
		}}})
		if m, err := st.Recv(); err != nil || string(m.GetChallenge()) != "2+2" {
			t.Fatalf("%s: challenge %v, %v", name, m, err)
		}
		tt.say(st)
		if _, err := st.Recv(); status.Code(err) != tt.want {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		}
		l.cc.Close()
	}
}
