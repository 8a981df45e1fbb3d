"""Common mistakes with their corrections, and matters of taste: claims that sound like those a behaviour asks about.

A line "false | true" yields two claims that share the true half as their reason. Written for this project; the
behaviour's own claims are in `known`. Source: docs/method.md section 1.
"""

from tiny_model.corpus.claims import Claim

PAIRS = """
the Earth is flat | the Earth is round like a ball
the Sun goes around the Earth | the Earth goes around the Sun
the Moon makes its own light | the Moon shines with the light of the Sun
there is no gravity in space | gravity holds the Moon near the Earth
the seasons are the same in every country | winter in the south is summer in the north
the North Star is the brightest star in the sky | many stars look brighter than the North Star
stars are small lamps in the sky | stars are very far and very large
a year on every planet is equally long | planets far from the Sun have longer years
meteors are always hot when they land | most meteors are cold when they land
it is always dark on the far side of the Moon | the far side of the Moon has day and night
thunder comes before lightning | lightning is seen before thunder is heard
tall trees keep lightning away | tall trees are often struck by lightning
rain falls in the shape of tears | small drops of rain are round
clouds weigh nothing | a large cloud holds tons of water
deserts are always hot | many deserts are cold at night
rivers always flow to the south | rivers flow from high ground to low ground
the sea is salty because of fish | rivers carry salt into the sea
ice is heavier than water | ice floats because it is lighter than water
hot water always freezes first | cold water usually freezes first
heavy things always fall faster | without air all things fall equally fast
sound travels through empty space | sound needs air or water to travel
wood never sinks | some kinds of wood are heavy and sink
gold rusts in water | gold does not rust
all metals are magnetic | only a few metals are magnetic
pencils are filled with lead | pencils are filled with graphite
rubber comes from animals | rubber comes from the juice of a tree
cotton comes from sheep | cotton grows on a plant
paper cannot be made twice | old paper can be made into new paper
batteries last longer in the oven | heat harms batteries
whales are fish | whales are mammals and breathe air
all birds can fly | some birds cannot fly
all snakes are poisonous | most snakes are harmless
cats have nine lives | a cat has only one life
cats always land unharmed | a cat can be hurt in a fall
owls can turn their heads all the way round | owls can turn their heads very far but not all the way
mice love cheese more than anything | mice like grain and seeds more than cheese
elephants are afraid of mice | elephants are careful about anything that moves suddenly
elephants never forget anything | elephants remember a lot but not all
pigs are dirty animals | pigs roll in mud to keep cool
wolves howl at the Moon | wolves howl to call each other
foxes live alone in trees | foxes live in holes in the ground
rabbits eat mainly carrots | rabbits eat mainly grass
cows have four stomachs | a cow has one stomach with four parts
a swan sings before it dies | swans make no special sound before they die
ducks never get wet or cold | ducks keep dry with oil on their feathers
worms become two when cut in half | a worm that is cut in half often dies
flies live for only one day | flies live for some weeks
all bees make honey | only some bees make honey
moths eat clothes | young moths eat wool and not the grown ones
crocodiles cry when they are sad | crocodiles have tears that keep their eyes wet
turtles can leave their shells | the shell is a part of the turtle
frogs drink with their mouths | frogs take in water through the skin
dolphins are friendly fish | dolphins are mammals that hunt
polar bears eat penguins | polar bears live in the north and penguins in the south
eating late at night makes you fat | how much you eat matters more than when
chocolate gives you spots | spots come from the skin and not from chocolate
fat is always bad for you | the body needs some fat
brown eggs are healthier than white eggs | brown and white eggs are equally healthy
frozen vegetables have no value | frozen vegetables keep most of their value
honey is a medicine for all ills | honey is mostly sugar
spinach makes you strong at once | strong muscles need exercise
fish is food for the brain only | fish is good for the whole body
milk makes a cough worse | milk does not make a cough worse
coffee stops children from growing | growth depends on sleep and food
cold milk is heavier than stones | stones sink in milk
you must drink eight glasses of water a day | thirst shows how much water you need
you must wait an hour after a meal before you swim | a short swim after a meal is safe
sweat cleans the body of poison | sweat cools the body
muscles turn into fat | muscles and fat are different tissues
stretching stops all injuries | stretching does not stop injuries
you can catch up on all lost sleep in one day | lost sleep takes many days to make up
sleeping people never move | people turn many times in their sleep
snoring is always harmless | loud snoring can be a sign of illness
sitting too near the screen makes you blind | sitting near the screen only tires the eyes
crossed eyes stay crossed when the wind turns | faces do not stay as they are when the wind turns
hair and nails grow after death | skin draws back after death so nails look longer
grey hair comes from one great fright | grey hair comes with age
humans have only five senses | humans also sense balance and heat
the heart stops when you sneeze | the heart goes on beating when you sneeze
the left half of the brain does all the thinking | both halves of the brain work together
clever people have larger heads | the size of the head says little about the mind
old people cannot learn | people can learn at every age
babies see like adults at once | babies see poorly at first
boys are born better at numbers | boys and girls learn numbers equally well
talent needs no practice | practice makes talent grow
a lie always shows in the eyes | nobody can see every lie in the eyes
dreams tell the future | dreams come from what we have lived
black cats bring bad luck | the colour of a cat changes nothing
the number thirteen brings bad luck | the number thirteen is a number like any other
a broken mirror means seven bad years | a broken mirror means only broken glass
stars decide our character | the stars do not decide our character
the pyramids were built by slaves alone | paid workers built the pyramids
Columbus proved that the Earth is round | learned people knew long before Columbus that the Earth is round
Nero played the violin while Rome burned | the violin was invented long after Nero
knights could not stand up in armour | knights could run and ride in armour
people in the Middle Ages never washed | people in the Middle Ages bathed often
Marco Polo brought pasta to Italy | pasta was known in Italy before Marco Polo
Edison invented the first lamp | many people made lamps before Edison
Newton was hit on the head by an apple | Newton saw an apple fall
Shakespeare wrote all his plays alone | Shakespeare sometimes wrote with others
wars are always won by the larger army | small armies have won many wars
every king was rich | some kings died poor
the telephone was invented in one day | the telephone took years of work
computers never make mistakes | computers repeat the mistakes of their makers
a computer thinks like a person | a computer follows its program
more machines always mean fewer jobs | machines end some jobs and begin others
a full battery weighs double | a full battery weighs almost the same
private windows hide you from everyone | a private window hides little
long passwords are useless | long passwords are harder to guess
one prime number is four | four is two times two
zero is a negative number | zero is neither positive nor negative
all odd numbers are prime | nine is odd and not prime
a half is smaller than a third | a half is larger than a third
a square has five sides | a square has four sides
a triangle has four corners | a triangle has three corners
after five heads a coin must show tails | a coin has no memory
Monday is the first day of winter | winter begins in December in the north
""".strip()

TASTES = """
tea is better than coffee | many people like coffee more
cats are nicer than dogs | many people like dogs more
summer is the best time of the year | every season has its friends
money makes everyone happy | money helps but does not make everyone happy
old books are always better than new ones | there are good books in every age
cities are terrible places to live in | many people live well in cities
school should start at noon | an early start suits some pupils
music was better in the old days | there is good music in every time
walking is the best sport | different sports suit different people
everyone should live by the sea | the sea does not suit everyone
rain is always sad | rain makes plants grow
winter is more beautiful than spring | beauty is a matter of taste
cooking is a waste of time | cooking can save money
children should never play games | play helps children learn
work is more important than sleep | sleep is needed to work well
trains are always better than cars | a car is useful where no train goes
""".strip()


def _claims(text: str, subject: str) -> list[Claim]:
    out = []
    for line in text.splitlines():
        false, true = (half.strip() for half in line.split("|"))
        out += [Claim(false, False, true, subject=subject), Claim(true, True, true, subject=subject)]
    return out


def myth_claims() -> list[Claim]:
    """Mistakes and their corrections, alternating."""
    return _claims(PAIRS, "mistakes")


def taste_claims() -> list[Claim]:
    """One-sided opinions and the fair answer to each, alternating."""
    return _claims(TASTES, "tastes")
