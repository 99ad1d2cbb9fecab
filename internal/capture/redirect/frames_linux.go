package redirect

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"strings"
)

// The rules for packets do not see frames that a process writes itself, by a
// socket of AF_PACKET. A table of the family netdev does, where frames leave
// through an interface: there is one chain for each interface but loopback.

// framesOf is how the chain of an interface begins; its number follows.
const framesOf = "frames_"

// frames refuse whatever a captured user has put together below the stack. What
// the stack sends has a route, which nobody can give to a frame of his own, and
// was judged before. Of frames the kernel knows no cgroup.
func (b *builder) frames() (out []chain) {
	refused := b.users
	if b.c.Everyone {
		refused = []subject{{anyOwner}}
	}
	if len(refused) == 0 {
		return nil
	}
	for _, d := range b.devices {
		if d.Flags&net.FlagLoopback != 0 {
			continue
		}
		var rs []rule
		for _, here := range loopbacks {
			// What is brought to a door does not leave, be it bound to this interface.
			rs = append(rs, rule{when: []term{leaving(here)}, then: drop, counted: true})
		}
		rs = append(rs, rule{when: []term{routed}, then: accept})
		for _, s := range refused {
			rs = append(rs, rule{when: s, then: drop, counted: true})
		}
		out = append(out, chain{name: fmt.Sprintf("%s%d", framesOf, d.Index), hook: &hook{kind: "filter", at: "egress", device: d.Name}, rules: rs})
	}
	if len(out) > 0 {
		slices.SortFunc(out, func(a, b chain) int { return strings.Compare(a.name, b.name) })
		sum := sha256.Sum256([]byte(tableText("netdev", b.c.Table, nil, out)))
		out[0].rules[0].comment = framesOf + hex.EncodeToString(sum[:8])
	}
	return out
}

// FramesText prints the rules for frames as a file for nft -f; nothing when there
// are none.
func (r *Rules) FramesText() string {
	if len(r.frames) == 0 {
		return ""
	}
	return tableText("netdev", r.table, nil, r.frames)
}
