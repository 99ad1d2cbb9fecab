package chart

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// MaxDrawn is how many nodes a drawing has at most: more than that is no
// picture.
const MaxDrawn = 150

// Rest is the name of the node that stands for all that are not drawn.
const Rest = "all others"

// Sizes of a drawing.
const (
	nodeWidth, nodeHeight = 168, 30
	gapX, gapY            = 96, 14
	margin                = 12
	sweeps                = 6 // of the ordering
)

// A Node is drawn at X, Y, its upper left corner.
type Node struct {
	End, Name  string
	X, Y, W, H int
	// Hot says that calls to or from it are refused.
	Hot bool
}

// A Path is a drawn link.
type Path struct {
	*Link
	// D is the path as SVG has it, and Width that of its stroke, from 1 to 5.
	D     string
	Width int
}

// A Drawing is a graph with a place for everything. Callers stand to the left of
// what they call.
type Drawing struct {
	Nodes  []Node
	Paths  []Path
	W, H   int
	Left   int // nodes that Rest stands for
	Merged bool
}

// Draw lays a graph out. One of too many nodes is drawn by the groups of its
// ends, and what is still too much as one node.
func (g *Graph) Draw() *Drawing {
	d := &Drawing{}
	if len(g.ends()) > MaxDrawn {
		g, d.Merged = g.Merge(Group), true
	}
	if all := g.ends(); len(all) > MaxDrawn {
		keep := g.busy(MaxDrawn - 1)
		d.Left = len(all) - len(keep)
		g = g.Merge(func(end string) string {
			if keep[end] {
				return end
			}
			return Rest
		})
	}
	g.place(d)
	return d
}

// busy are the n ends with most calls.
func (g *Graph) busy(n int) map[string]bool {
	calls := map[string]uint64{}
	for _, l := range g.Links {
		calls[l.Src] += l.Allowed + l.Denied
		calls[l.Dst] += l.Allowed + l.Denied
	}
	all := g.ends()
	slices.SortStableFunc(all, func(a, b string) int { return cmp.Compare(calls[b], calls[a]) })
	keep := map[string]bool{}
	for _, end := range all[:min(n, len(all))] {
		keep[end] = true
	}
	return keep
}

// A layering is the graph by columns.
type layering struct {
	ends    []string
	at      map[string]int // in ends
	out, in [][]int
	column  []int
	columns [][]int
	row     []int // within the column
}

func (g *Graph) layers() *layering {
	y := &layering{ends: g.ends(), at: map[string]int{}}
	n := len(y.ends)
	for i, end := range y.ends {
		y.at[end] = i
	}
	y.out, y.in, y.column, y.row = make([][]int, n), make([][]int, n), make([]int, n), make([]int, n)
	for _, l := range g.Links {
		a, b := y.at[l.Src], y.at[l.Dst]
		if a != b {
			y.out[a], y.in[b] = append(y.out[a], b), append(y.in[b], a)
		}
	}
	y.stack()
	y.order()
	return y
}

// stack gives each node a column right of those that call it, but for the links
// that close a circle.
func (y *layering) stack() {
	const fresh, open, done = 0, 1, 2
	state := make([]int, len(y.ends))
	back := map[[2]int]bool{}
	var sorted []int // callers last
	var visit func(int)
	visit = func(v int) {
		state[v] = open
		for _, w := range y.out[v] {
			switch state[w] {
			case fresh:
				visit(w)
			case open:
				back[[2]int{v, w}] = true
			}
		}
		state[v] = done
		sorted = append(sorted, v)
	}
	roots := make([]int, len(y.ends))
	for i := range roots {
		roots[i] = i
	}
	slices.SortStableFunc(roots, func(a, b int) int { return cmp.Compare(len(y.in[a]), len(y.in[b])) })
	for _, v := range roots {
		if state[v] == fresh {
			visit(v)
		}
	}
	for _, v := range slices.Backward(sorted) {
		for _, w := range y.out[v] {
			if !back[[2]int{v, w}] {
				y.column[w] = max(y.column[w], y.column[v]+1)
			}
		}
	}
	y.columns = make([][]int, 1+slices.Max(append([]int{0}, y.column...)))
	for v, c := range y.column {
		y.row[v] = len(y.columns[c])
		y.columns[c] = append(y.columns[c], v)
	}
}

// order moves nodes near those they are linked to, so that fewer links cross.
func (y *layering) order() {
	for sweep := range sweeps {
		for i := range y.columns {
			near := y.in
			c := y.columns[i]
			if sweep%2 == 1 {
				near, c = y.out, y.columns[len(y.columns)-1-i]
			}
			weight := map[int]float64{}
			for _, v := range c {
				weight[v] = float64(y.row[v])
				if len(near[v]) == 0 {
					continue
				}
				sum := 0.0
				for _, w := range near[v] {
					sum += (float64(y.row[w]) + 0.5) / float64(len(y.columns[y.column[w]]))
				}
				weight[v] = sum / float64(len(near[v])) * float64(len(c))
			}
			slices.SortStableFunc(c, func(a, b int) int { return cmp.Compare(weight[a], weight[b]) })
			for r, v := range c {
				y.row[v] = r
			}
		}
	}
}

// place gives everything its coordinates.
func (g *Graph) place(d *Drawing) {
	y := g.layers()
	tallest := 0
	for _, c := range y.columns {
		tallest = max(tallest, len(c))
	}
	high := tallest*(nodeHeight+gapY) - gapY
	hot := map[string]bool{}
	for _, l := range g.Links {
		if l.State == Refused {
			hot[l.Src], hot[l.Dst] = true, true
		}
	}
	names := g.names()
	place := make([]Node, len(y.ends))
	for i, c := range y.columns {
		top := margin + (high-(len(c)*(nodeHeight+gapY)-gapY))/2
		for r, v := range c {
			place[v] = Node{
				End: y.ends[v], Name: clip(names[y.ends[v]], 22), Hot: hot[y.ends[v]],
				X: margin + i*(nodeWidth+gapX), Y: top + r*(nodeHeight+gapY), W: nodeWidth, H: nodeHeight,
			}
		}
	}
	d.W, d.H = 2*margin+len(y.columns)*(nodeWidth+gapX)-gapX, max(2*margin+high, nodeHeight)
	top := uint64(1)
	for _, l := range g.Links {
		top = max(top, l.Allowed+l.Denied)
	}
	for i := range g.Links {
		l := &g.Links[i]
		a, b := &place[y.at[l.Src]], &place[y.at[l.Dst]]
		d.Paths = append(d.Paths, Path{Link: l, D: curve(a, b), Width: width(l.Allowed+l.Denied, top)})
	}
	d.Nodes = place
}

// curve goes from the right side of one node to the left of another, and over
// the top when that is not to the right.
func curve(a, b *Node) string {
	x1, y1, x2, y2 := a.X+a.W, a.Y+a.H/2, b.X, b.Y+b.H/2
	if x2 > x1 {
		half := (x2 - x1) / 2
		return fmt.Sprintf("M%d %dC%d %d %d %d %d %d", x1, y1, x1+half, y1, x2-half, y2, x2, y2)
	}
	lift := min(a.Y, b.Y) - 10
	return fmt.Sprintf("M%d %dC%d %d %d %d %d %d", x1, y1, x1+gapX/2, lift, x2-gapX/2, lift, x2, y2)
}

// width grows by one for each power of ten below the busiest link.
func width(n, top uint64) int {
	w := 5
	for ; w > 1 && n < top; w-- {
		n *= 10
	}
	return w
}

func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return strings.TrimRight(string(r[:n-1]), " ") + "…"
	}
	return s
}
