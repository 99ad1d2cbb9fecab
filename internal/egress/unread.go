package egress

import (
	"errors"
	"sync"

	"golang.org/x/net/http2"

	"sallyport/internal/mux"
)

// The HTTP/2 server keeps the DATA that no tunnel has read yet, up to connWindow for
// each connection. It does not say how much that is, but what passes does: DATA that
// comes, less what is given back by the WINDOW_UPDATEs of the connection.

const (
	// connWindow is what the server lets each connection send ahead, and streamWindow
	// each of its streams, bytes.
	connWindow, streamWindow = 1 << 20, 256 << 10
	// unreadFree is what a connection may hold unread for nothing, a step of 4 KiB
	// included in which the server gives back what was read.
	unreadFree = 16 << 10
	// unreadPortion is how much is taken at once, so that it is not done for each frame.
	unreadPortion = 16 << 10
)

// errHoarded says that there is no memory left for what a connection brings.
var errHoarded = errors.New("data that nobody reads")

// An unread is what a connection of HTTP/2 brings and nobody has read. It is safe for
// one reader of the connection beside one writer.
type unread struct {
	budget  *mux.Budget
	in, out frames // what the peer sends, and what it is sent

	mu     sync.Mutex // guards the fields below
	opened bool       // the window of the connection was made larger than at first
	held   int        // what has come and was not given back
	paid   int        // what of it is taken out of budget
	over   bool
}

func newUnread(budget *mux.Budget) *unread {
	return &unread{budget: budget, in: frames{skip: len(http2.ClientPreface)}}
}

// came notes what was read from the peer. It is false when there is no memory for it.
func (u *unread) came(p []byte) bool {
	n, _ := u.in.pass(p)
	if n == 0 {
		return true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.held += n
	more := u.due() - u.paid
	if u.over || more <= 0 {
		return true
	}
	if !u.budget.Take(more) {
		return false
	}
	u.paid += more
	return true
}

// went notes what is written to the peer.
func (u *unread) went(p []byte) {
	_, n := u.out.pass(p)
	if n == 0 {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.opened { // the first one gives nothing back, RFC 9113 section 6.9.2
		u.opened, n = true, n-(connWindow-65535)
	}
	u.held -= n
	if less := u.paid - u.due(); less > 0 {
		u.budget.Give(less)
		u.paid -= less
	}
}

// due is what is to be paid for. The lock is held.
func (u *unread) due() int {
	held := min(u.held, connWindow) // the server keeps nothing of what exceeds a window
	return max(held-unreadFree+unreadPortion-1, 0) / unreadPortion * unreadPortion
}

// end gives everything back. Nothing is taken any more.
func (u *unread) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.over = true
	u.budget.Give(u.paid)
	u.paid = 0
}

// frames follows the frames of HTTP/2 (RFC 9113 section 4.1) in what passes in pieces
// of any size.
type frames struct {
	skip int // bytes before the first frame
	head [9]byte
	n    int    // how much of head is there
	at   int    // how much of the payload has passed
	word uint32 // the payload of a WINDOW_UPDATE
}

// pass counts what of p is payload of DATA, its padding included, as flow control
// counts it, and what WINDOW_UPDATEs that end in p give the connection.
func (f *frames) pass(p []byte) (data, given int) {
	k := min(f.skip, len(p))
	f.skip -= k
	for p = p[k:]; len(p) > 0; p = p[k:] {
		if f.n < len(f.head) {
			k = copy(f.head[f.n:], p)
			f.n += k
			f.at, f.word = 0, 0
		} else {
			k = min(f.length()-f.at, len(p))
			f.at += k
			switch http2.FrameType(f.head[3]) {
			case http2.FrameData:
				data += k
			case http2.FrameWindowUpdate:
				given += f.window(p[:k])
			}
		}
		if f.n == len(f.head) && f.at == f.length() {
			f.n = 0
		}
	}
	return data, given
}

func (f *frames) length() int { return int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2]) }

// window is by how much a WINDOW_UPDATE that ends with p makes the window of the
// connection larger.
func (f *frames) window(p []byte) int {
	for _, b := range p {
		f.word = f.word<<8 | uint32(b)
	}
	if ofConnection := f.head[5]&0x7f|f.head[6]|f.head[7]|f.head[8] == 0; !ofConnection || f.at != 4 || f.length() != 4 {
		return 0
	}
	return int(f.word & (1<<31 - 1))
}
