package page

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/jose"
	"sallyport/internal/mux"
)

// The roles that a provider's groups give. On the page an admin may do what an
// operator may, and what will be added for nobody else.
const (
	roleViewer   = "viewer"
	roleOperator = "operator"
	roleAdmin    = "admin"
)

const (
	// A sign-in is to be done within flowLife. Who has signed in stays as long as
	// personLife, and then asks the provider again.
	flowLife   = 10 * time.Minute
	personLife = time.Hour
	// maxRedeems is how many codes are redeemed at once, maxRedeemsEach how many for
	// one address. An address has a burst of sign-ins that come to nothing, and a rate
	// per second: each has the provider asked.
	maxRedeems, maxRedeemsEach = 8, 2
	vainBurst, vainRate        = 30, 0.2
	// sayApart is the least time between two lines of the log that nobody can sign in.
	sayApart = time.Minute
	// flowCookie ties a sign-in to the browser that began it, and enterCookie the token
	// at its end. Neither opens anything.
	flowCookie  = "__Host-sallyport-signin"
	enterCookie = "__Host-sallyport-enter"
	// signinHeader tells the page's script where to sign in.
	signinHeader = "Sallyport-Signin"
)

// redeems bound what sign-ins cost the provider, and the log.
type redeems struct {
	vain *mux.Calm[mux.Source]
	said atomic.Int64 // when the log was told last

	mu  sync.Mutex // guards the fields below
	all int
	of  map[mux.Source]int
}

func (d *redeems) init() {
	d.vain, d.of = mux.NewCalm[mux.Source](vainBurst, vainRate), map[mux.Source]int{}
}

// enter begins to redeem a code for an address, which is over when leave is called.
func (d *redeems) enter(from mux.Source) (leave func(), ok bool) {
	if d.vain.Over(from) {
		return nil, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.all >= maxRedeems || d.of[from] >= maxRedeemsEach {
		return nil, false
	}
	d.all++
	d.of[from]++
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.all--
		if d.of[from]--; d.of[from] == 0 {
			delete(d.of, from)
		}
	}, true
}

// sourceOf is where a request comes from, as a peer cannot choose it.
func sourceOf(r *http.Request) mux.Source {
	at, _ := netip.ParseAddrPort(r.RemoteAddr) // what is none is one source
	return mux.SourceOf(net.TCPAddrFromAddrPort(at))
}

// A flow is one sign-in. All of it follows from the browser's cookie and a key of
// this process, so that strangers fill no memory.
type flow struct{ state, nonce, verifier string }

func (p *Page) flowOf(cookie string) flow {
	of := func(what string) string {
		m := hmac.New(sha256.New, p.door.key[:])
		fmt.Fprintf(m, "signin %s\n%s", what, cookie)
		return base64.RawURLEncoding.EncodeToString(m.Sum(nil))
	}
	return flow{of("state"), of("nonce"), of("verifier")}
}

// begun says if a cookie is of a sign-in that is not too old.
func begun(cookie string, now time.Time) bool {
	at, _, ok := strings.Cut(cookie, ".")
	s, err := strconv.ParseInt(at, 10, 64)
	age := now.Sub(time.Unix(s, 0))
	return ok && err == nil && age >= 0 && age < flowLife
}

// signin sends a browser to the provider.
func (p *Page) signin(w http.ResponseWriter, r *http.Request) {
	now := p.cfg.Now()
	m, err := p.provider.discover(r.Context(), now)
	if err != nil {
		p.noSignin(w, r, err)
		return
	}
	cookie := fmt.Sprintf("%d.%s%s", now.Unix(), rand.Text(), rand.Text())
	http.SetCookie(w, &http.Cookie{Name: flowCookie, Value: cookie, Path: "/", MaxAge: int(flowLife.Seconds()), Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode})
	http.Redirect(w, r, p.provider.authorize(m, p.flowOf(cookie)), http.StatusSeeOther)
}

func (p *Page) noSignin(w http.ResponseWriter, r *http.Request, err error) {
	now, last := p.cfg.Now().UnixNano(), p.redeems.said.Load()
	if r.Context().Err() == nil && now-last >= int64(sayApart) && p.redeems.said.CompareAndSwap(last, now) {
		p.cfg.Log.Warn("nobody can sign in to the page by the provider", "issuer", p.provider.cfg.Issuer, "err", err)
	}
	http.Error(w, "the provider does not let you in now; the issuer's log says why", http.StatusBadGateway)
}

// providerError is what a provider may call a refusal.
var providerError = regexp.MustCompile(`^[a-z_]{1,40}$`)

// signedIn takes a browser back from the provider, and gives it the token of a
// link: the page's script trades that for a session, as it does with any link.
func (p *Page) signedIn(w http.ResponseWriter, r *http.Request) {
	c, err := r.Cookie(flowCookie)
	http.SetCookie(w, &http.Cookie{Name: flowCookie, Path: "/", MaxAge: -1, Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode})
	now, q := p.cfg.Now(), r.URL.Query()
	if err != nil || !begun(c.Value, now) || !hmac.Equal([]byte(q.Get("state")), []byte(p.flowOf(c.Value).state)) {
		http.Error(w, "this browser has begun no such sign-in, or too long ago; begin anew", http.StatusForbidden)
		return
	}
	if iss := q.Get("iss"); iss != "" && iss != p.provider.cfg.Issuer { // RFC 9207
		http.Error(w, "this is the answer of another provider", http.StatusForbidden)
		return
	}
	if e := q.Get("error"); e != "" || q.Get("code") == "" {
		if !providerError.MatchString(e) {
			e = "without a reason"
		}
		http.Error(w, "the provider has refused: "+e, http.StatusForbidden)
		return
	}
	from := sourceOf(r)
	leave, ok := p.redeems.enter(from)
	if !ok {
		http.Error(w, "many sign in now; do it again", http.StatusTooManyRequests)
		return
	}
	defer leave()
	m, err := p.provider.discover(r.Context(), now)
	if err != nil {
		p.noSignin(w, r, err)
		return
	}
	t, err := p.provider.redeem(r.Context(), m, q.Get("code"), p.flowOf(c.Value), now)
	if err != nil {
		p.redeems.vain.Spend(from, 1)
		p.noSignin(w, r, err)
		return
	}
	p.admit(w, r, t, now)
}

// admit lets a person in whose groups give a role.
func (p *Page) admit(w http.ResponseWriter, r *http.Request, t *jose.Token, now time.Time) {
	groups, _ := t.Claims.Texts(p.provider.cfg.Claim, maxGroups) // what is none of these gives no role
	role := p.provider.cfg.role(groups)
	id, err := p.person(t, role)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	if role == "" {
		if p.door.tell(id.String(), now) && !p.recorded(w, r, control.AdminCall{Caller: id, Method: methodEnter, Peer: r.RemoteAddr}) {
			return
		}
		http.Error(w, "none of your groups has a role here: page.oidc.viewers, operators and admins name those that have", http.StatusForbidden)
		return
	}
	token, browser := rand.Text()+rand.Text(), rand.Text()
	p.door.mu.Lock()
	crowdOut(p.door.links, id)
	put(p.door.links, token, pass{until: now.Add(linkLife), id: id, role: role, browser: browser}, maxLinks)
	p.door.mu.Unlock()
	http.SetCookie(w, &http.Cookie{Name: enterCookie, Value: browser, Path: "/", MaxAge: int(linkLife.Seconds()), Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	http.Redirect(w, r, "/denied#"+token, http.StatusSeeOther)
}

// plainSubject is a subject that can stand in a SPIFFE ID as it is.
var plainSubject = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$`)

// person is the identity by which a person stands in records and in rows that
// deny: its role, and its subject at the provider, hashed where a SPIFFE ID cannot
// hold it. A hash has a prefix that no plain subject is let to have.
func (p *Page) person(t *jose.Token, role string) (spiffeid.ID, error) {
	sub, err := t.Claims.Text("sub")
	if err != nil {
		return spiffeid.ID{}, err
	}
	const hashed = "sha256-"
	if !plainSubject.MatchString(sub) || strings.HasPrefix(sub, hashed) {
		sum := sha256.Sum256([]byte(sub))
		sub = hashed + hex.EncodeToString(sum[:])
	}
	if role == "" {
		role = "none"
	}
	return spiffeid.FromSegments(p.cfg.TrustDomain, "oidc", role, sub)
}

// roleMay says what a role lets people do.
func roleMay(role, method string) bool {
	switch method {
	case MethodView:
		return role == roleViewer || role == roleOperator || role == roleAdmin
	case MethodMoveRollout:
		return role == roleOperator || role == roleAdmin
	}
	return role == roleAdmin
}

// Run keeps the keys of the provider fresh until ctx ends. Without one it waits.
func (p *Page) Run(ctx context.Context) error {
	if p.provider == nil {
		<-ctx.Done()
		return nil
	}
	return p.provider.keys.Run(ctx)
}
