package mesh

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A RolloutState says how far a set of policies has come that goes to a canary
// group first.
type RolloutState string

// Baking waits for the canary proxies and for time, Held waits for the
// operator: a canary proxy failed and there is no set to go back by. The others
// are the ends: in force everywhere, taken back, or overtaken by another set.
const (
	Baking    RolloutState = "baking"
	Held      RolloutState = "held"
	Promoted  RolloutState = "promoted"
	TakenBack RolloutState = "taken_back"
	Overtaken RolloutState = "overtaken"
)

// The groups of proxies while a set is baking.
const (
	GroupCanary = "canary"
	GroupFleet  = "fleet"
)

// A Rollout is a set of policies that goes to a canary group before the fleet,
// or the last that did.
type Rollout struct {
	// Revision, Set and PolicyHash are those of the new policies.
	Revision   uint64       `json:"revision"`
	Set        string       `json:"set"`
	PolicyHash string       `json:"policy_hash"`
	State      RolloutState `json:"state"`
	// Group are the selectors of the canary proxies.
	Group []string `json:"group"`
	// Bake is how long they must do well before all others follow; 0 when only
	// an operator lets them.
	Bake time.Duration `json:"bake"`
	// Fallback is the revision by which they go back; 0 when there is none.
	Fallback uint64 `json:"fallback,omitempty"`
	// By is who pushed it.
	By      string    `json:"by"`
	Started time.Time `json:"started"`
	// Ended and Why are of a rollout that is over; Why also of one that is held.
	Ended time.Time `json:"ended,omitzero"`
	Why   string    `json:"why,omitempty"`
	// Members are the canary proxies, of which so many have acknowledged.
	Members int `json:"members"`
	Acked   int `json:"acked"`
}

// Active reports whether the canary proxies are to act on other policies than
// the fleet.
func (r *Rollout) Active() bool { return r != nil && (r.State == Baking || r.State == Held) }

// MaxBake bounds how long a rollout may bake.
const MaxBake = 7 * 24 * time.Hour

// maxGroup bounds the selectors of a group.
const maxGroup = 64

// A Group says which proxies are canaries. The zero Group has none.
type Group struct{ any []chooser }

// A chooser reads one selector.
type chooser struct {
	word, value string
	share       uint64 // of shareWhole
}

// shareWhole is 100 %.
const shareWhole = 10_000

// ParseGroup reads selectors; a proxy is in the group when one of them chooses
// it:
//
//	spiffe://td/ns/shop/**    by a pattern of the workload
//	agent=spiffe://td/...     by a pattern of the agent
//	node=k8s_psat:cluster:eu  by a selector of node attestation
//	kind=gateway              by the kind of the proxy
//	5%                        that share of all, always the same ones
func ParseGroup(selectors []string) (Group, error) {
	var g Group
	var errs []error
	if len(selectors) == 0 || len(selectors) > maxGroup {
		errs = append(errs, fmt.Errorf("canary: %d selectors, want 1 to %d", len(selectors), maxGroup))
	}
	for _, s := range selectors {
		c, err := parseChooser(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("canary: %w", err))
		}
		g.any = append(g.any, c)
	}
	return g, errors.Join(errs...)
}

func parseChooser(s string) (chooser, error) {
	if n, ok := strings.CutSuffix(s, "%"); ok {
		share, err := strconv.ParseFloat(n, 64)
		// Written so that what is not a number is out of range too.
		if ok = err == nil && share >= 0.01 && share <= 99.99; !ok || strings.ContainsAny(n, "+-eExXpP_") {
			return chooser{}, fmt.Errorf("%q is not a share: write 0.01%% to 99.99%%", clip(s))
		}
		return chooser{word: "share", share: uint64(share*shareWhole/100 + 0.5)}, nil
	}
	if strings.HasPrefix(s, "spiffe://") {
		return chooser{word: "workload", value: s}, CheckIDPattern(s)
	}
	word, value, _ := strings.Cut(s, "=")
	switch word {
	case "agent":
		return chooser{word: word, value: value}, CheckIDPattern(value)
	case "kind":
		if value != "sidecar" && value != "gateway" {
			return chooser{}, fmt.Errorf("%q: kind is sidecar or gateway", clip(s))
		}
		return chooser{word: word, value: value}, nil
	case "node":
		sel, err := ParseSelector(value)
		return chooser{word: word, value: sel.String()}, err
	}
	return chooser{}, fmt.Errorf("%q chooses no proxy: write a SPIFFE ID or pattern, agent=, node=, kind= or a share such as 5%%", clip(s))
}

// Has reports whether a proxy is in the group, given the selectors that its
// agent was attested with.
func (g Group) Has(agent, workload spiffeid.ID, kind string, facts []Selector) bool {
	return slices.ContainsFunc(g.any, func(c chooser) bool {
		switch c.word {
		case "share":
			return ticket(agent, workload) < c.share
		case "workload":
			return MatchSrc(c.value, workload.String())
		case "agent":
			return MatchSrc(c.value, agent.String())
		case "kind":
			return c.value == kind
		case "node":
			return slices.ContainsFunc(facts, func(s Selector) bool { return s.String() == c.value })
		}
		return false
	})
}

// ticket is the place of a proxy among all, the same at every issuer and in
// every rollout.
func ticket(agent, workload spiffeid.ID) uint64 {
	sum := sha256.Sum256([]byte(agent.String() + " " + workload.String()))
	return binary.BigEndian.Uint64(sum[:8]) % shareWhole
}
